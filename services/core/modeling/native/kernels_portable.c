/* Any processor: vectors of the compiler, with no more than it uses anyway. */
#include "kernels.h"
