// SPDX-License-Identifier: Apache-2.0

// Package cli is what the programs have in common at their rim: how they are entered and left, how they talk to
// whoever typed the command, and how flags become typed values.
//
// A program is a function run(ctx, Env) error, and its main is [Main] around it. Env carries everything that the function gets from
// the outside, so that a test runs the whole program in its own process with [Run]. Nothing in this package is kept
// between calls; the only goroutine is Main's, which listens for signals and ends with the process.
//
// What the user sees:
//
//	error: what is wrong, one line for each joined error
//	hint: what to do about it, where an error in the chain has a Hint() string
//
// The exit status is 0 after success, [StatusUsage] for a command line that makes no sense (a [UsageError]), and
// [StatusFailed] for everything else.
//
// Flags are pflag's. A daemon declares them in groups with [Flags], which also renders its help and parses; a cobra program uses
// the same values, [FlagError] and [WriteFlags]. After parsing, values have their final types: no mode and no list
// travels on as a string.
package cli
