// SPDX-License-Identifier: Apache-2.0
package main

type part struct{ name, text string }

func (r *report) parts() []part                       { return nil }
func replacePart(page []byte, p part) ([]byte, error) { return page, nil }
