// SPDX-License-Identifier: Apache-2.0

package redirect

import "github.com/cilium/ebpf"

// hook is a place in the kernel where one of the programs runs. Program, link pin and hook have one name.
type hook struct {
	name   string
	attach ebpf.AttachType
	// last: other programs on the hook (a Service load balancer) may choose the address, so this one has to run after them.
	last bool
}

// Hooks names the places at which a program has to run, in the order of [Kernel.Programs].
func Hooks() []string {
	var names []string
	for _, h := range hooks() {
		names = append(names, h.name)
	}
	return names
}

// hooks are in the order in which programs are swapped. Nothing is atomic across hooks, so what understands a record comes
// before what makes it.
func hooks() []hook {
	return []hook{
		{name: kernelProgSockOps, attach: ebpf.AttachCGroupSockOps},
		{name: kernelProgGetpeername4, attach: ebpf.AttachCgroupInet4GetPeername},
		{name: kernelProgGetpeername6, attach: ebpf.AttachCgroupInet6GetPeername},
		{name: kernelProgBind4, attach: ebpf.AttachCGroupInet4Bind},
		{name: kernelProgBind6, attach: ebpf.AttachCGroupInet6Bind},
		{name: kernelProgConnect4, attach: ebpf.AttachCGroupInet4Connect, last: true},
		{name: kernelProgConnect6, attach: ebpf.AttachCGroupInet6Connect, last: true},
	}
}
