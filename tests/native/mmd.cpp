// MMD's CUDA kernels on the CPU, for ctypes.
#include "cuda/mmd.cu"

extern "C" {

void seed(std::uint64_t value) { emulator::seed = value; }

void parts(bool wide, std::int64_t N, std::int64_t M, std::int64_t* strips_and_chunks) {
  const auto found = fastxm::mmd_parts_cuda(wide, N, M);
  std::copy(found.begin(), found.end(), strips_and_chunks);
}

void tile(const fastxm::MmdKernelNumbers& kernel, const fastxm::MmdTileNumbers& numbers) {
  fastxm::mmd_tile_cuda(kernel, numbers, 0);
}

void derivatives(const fastxm::MmdKernelNumbers& kernel, const fastxm::MmdTileNumbers& numbers) {
  fastxm::mmd_derivatives_cuda(kernel, numbers, 0);
}

}  // extern "C"
