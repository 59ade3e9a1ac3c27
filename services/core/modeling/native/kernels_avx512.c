/* x86-64 with AVX-512. */
#define SET_AVX512
#include "kernels.h"
