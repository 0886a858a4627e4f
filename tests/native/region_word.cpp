// Region-word scores' CUDA kernels on the CPU, for ctypes.
#include "cuda/region_word.cu"

extern "C" {

void seed(std::uint64_t value) { emulator::seed = value; }

auto attention = &fastxm::region_word_attention_cuda;
auto pool = &fastxm::region_word_pool_cuda;
auto bwd = &fastxm::region_word_bwd_cuda;

}  // extern "C"
