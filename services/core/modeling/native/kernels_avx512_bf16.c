/* x86-64 with AVX-512 BF16: products of bf16. */
#define SET_AVX512
#define BF16_PRODUCTS
#include "kernels.h"
