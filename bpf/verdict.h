/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
#pragma once

#include <bpf/bpf_helpers.h>

#include "maps.h"

#define ENOMEM 12
#define EACCES 13
#define EHOSTUNREACH 113

enum { REFUSE = 0, PROCEED = 1 };

/* The system call fails with err, or with EPERM where the kernel cannot be told (before 5.18). */
static __always_inline int refuse(int err)
{
	if (have_set_retval)
		bpf_set_retval(-err);
	return REFUSE;
}
