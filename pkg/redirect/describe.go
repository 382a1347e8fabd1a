// SPDX-License-Identifier: Apache-2.0

package redirect

// CgroupRoot is the folder that the programs are attached to.
func (k *Kernel) CgroupRoot() (string, error) {
	group, err := openCgroup(k.opts.CgroupRoot)
	if err != nil {
		return "", err
	}
	return group.Name(), group.Close()
}

// Pins is the folder below which everything is pinned.
func (k *Kernel) Pins() string { return k.pins.version() }

// Missing says, a sentence each, what this kernel cannot do and what users see instead.
func (k *Kernel) Missing() []string {
	var missing []string
	for _, feature := range []struct{ variable, sentence string }{
		{kernelVarHaveSetRetval, "before Linux 5.18 a connect to an offline node is reset instead of refused with EHOSTUNREACH"},
		{kernelVarHaveSockOpsNetns, "before Linux 5.15 a pod's own listeners on the redirect ports are counted as unknown connections"},
	} {
		var have uint8
		if err := k.spec.Variables[feature.variable].Get(&have); err == nil && have == 0 {
			missing = append(missing, feature.sentence)
		}
	}
	return missing
}
