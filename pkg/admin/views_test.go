// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"reflect"
	"strings"
	"testing"
)

// The JSON is a contract: snake_case names, and units in the names of numbers that have one.
func TestNamesOfViews(t *testing.T) {
	seen := map[reflect.Type]bool{}
	var check func(reflect.Type)
	check = func(v reflect.Type) {
		for v.Kind() == reflect.Pointer || v.Kind() == reflect.Slice {
			v = v.Elem()
		}
		if v.Kind() != reflect.Struct || v.PkgPath() != reflect.TypeFor[Status]().PkgPath() || seen[v] {
			return
		}
		seen[v] = true
		for i := range v.NumField() {
			field := v.Field(i)
			name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
			if name == "" || !isSnake(name) {
				t.Errorf("%s.%s is called %q", v.Name(), field.Name, name)
			}
			if field.Type.Kind() == reflect.Float64 && !strings.HasSuffix(name, "_seconds") {
				t.Errorf("%s.%s has no unit in its name %q", v.Name(), field.Name, name)
			}
			if strings.HasSuffix(field.Name, "Bytes") != strings.HasSuffix(name, "_bytes") {
				t.Errorf("%s.%s is called %q", v.Name(), field.Name, name)
			}
			if field.Type.String() == "time.Duration" {
				t.Errorf("%s.%s would be a number of nanoseconds", v.Name(), field.Name)
			}
			check(field.Type)
		}
	}
	for _, v := range []any{State{}, TargetList{}, TunnelList{}, ConnectionList{}, Forgotten{}} {
		check(reflect.TypeOf(v))
	}
	if len(seen) < 12 {
		t.Errorf("only %d types were looked at", len(seen))
	}
}
