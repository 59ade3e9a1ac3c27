/* x86-64 with AVX2 and FMA. */
#define SET_AVX2
#include "kernels.h"
