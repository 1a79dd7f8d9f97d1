// Which kernels the entry points call: the build compiles entry_a4.cpp for w2a4._C with those of
// cpu/ and, with W2A4_CUDA defined, for w2a4._cuda with those of cuda/.
#pragma once

#ifdef W2A4_CUDA
#include "cuda/kernels.h"
namespace w2a4 {
namespace kernels = cuda;
}
#else
#include "cpu/kernels.h"
namespace w2a4 {
namespace kernels = cpu;
}
#endif
