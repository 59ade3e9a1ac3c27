/* arm64, all of which have NEON. */
#ifndef __aarch64__
#error "for arm64 only"
#endif
#define SET_NEON
#include "kernels.h"
