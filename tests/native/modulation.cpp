// Modulation's CUDA kernels on the CPU, for ctypes.
#include "cuda/modulation.cu"

extern "C" {

void seed(std::uint64_t value) { emulator::seed = value; }

void run(int pass, const void* sizes, const void* addresses) {
  fastxm::modulation_cuda(pass, emulator::array<fastxm::ModulationSizes>(sizes),
                          emulator::array<fastxm::ModulationAddresses>(addresses), 0);
}

}  // extern "C"
