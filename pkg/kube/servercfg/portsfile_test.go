// SPDX-License-Identifier: Apache-2.0

package servercfg

import "testing"

func FuzzDecodePorts(f *testing.F) {
	f.Add([]byte(`{"version":1,"ports":[9100,9256,9100]}`))
	f.Add([]byte(`{"version":1,"ports":[0]}`))
	f.Add([]byte(`{"version":1,"ports":[65536]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := DecodePorts(data)
		if err != nil && list != nil {
			t.Error("an error and ports")
		}
		for i, p := range list {
			if p == 0 || i > 0 && list[i-1] >= p {
				t.Errorf("%v is not sorted or has no ports", list)
			}
		}
	})
}
