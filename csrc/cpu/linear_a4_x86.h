// Headers of the x86 kernels, and whether this compiler has their instructions.
#pragma once

#include "arch.h"

#ifdef W2A4_X86
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>

#include "linear_a4.h"
#include "numbers.h"
