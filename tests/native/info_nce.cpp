// InfoNCE's CUDA kernels on the CPU, for ctypes.
#include "cuda/info_nce.cu"
#include "cuda/info_nce_rows.cu"
#include "cuda/info_nce_small.cu"

using Address = std::uintptr_t;

extern "C" {

void seed(std::uint64_t value) { emulator::seed = value; }

std::int64_t workspace(std::int64_t rows, std::int64_t columns) {
  return fastxm::info_nce_workspace_cuda(rows, columns);
}

void fwd(const void* sizes, const void* addresses, Address row_stats, std::int64_t row_stride,
         Address column_stats, Address workspace) {
  fastxm::info_nce_fwd_cuda(emulator::array<fastxm::InfoNceSizes>(sizes),
                            emulator::array<fastxm::InfoNceAddresses>(addresses), row_stats, row_stride,
                            column_stats, workspace, 0);
}

void bwd(const void* sizes, const void* addresses, Address row_terms, std::int64_t row_stride,
         Address column_terms, double smoothing, bool out_bf16, Address out) {
  fastxm::info_nce_bwd_cuda(emulator::array<fastxm::InfoNceSizes>(sizes),
                            emulator::array<fastxm::InfoNceAddresses>(addresses), row_terms, row_stride,
                            column_terms, smoothing, out_bf16, out, 0);
}

void small(const void* sizes, const void* addresses, double smoothing) {
  fastxm::info_nce_small_cuda(emulator::array<fastxm::InfoNceSmallSizes>(sizes),
                              emulator::array<fastxm::InfoNceSmallAddresses>(addresses), smoothing, 0);
}

void rnorms(const void* sizes, Address x, Address y, Address out) {
  fastxm::info_nce_rnorms_cuda(emulator::array<fastxm::InfoNceRowsSizes>(sizes), x, y, out, 0);
}

void finish(const void* sizes, const void* addresses) {
  fastxm::info_nce_finish_cuda(emulator::array<fastxm::InfoNceRowsSizes>(sizes),
                               emulator::array<std::array<std::uintptr_t, 5>>(addresses), 0);
}

}  // extern "C"
