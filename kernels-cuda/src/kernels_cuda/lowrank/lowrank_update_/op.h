// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/weights.h"

namespace kernels {

// weight <- decay weight - alpha back
void lowrank_write(const Write& in, void* stream);

}  // namespace kernels
