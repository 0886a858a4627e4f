// InfoNCE's CUDA kernels on the CPU, for ctypes.
#include "cuda/info_nce.cu"
#include "cuda/info_nce_small.cu"

using Address = std::uintptr_t;

template <class Array>
static Array array(const void* from) {
  Array result;
  std::memcpy(result.data(), from, sizeof result);
  return result;
}

extern "C" {

void seed(std::uint64_t value) { emulator::seed = value; }

std::int64_t workspace(std::int64_t rows, std::int64_t columns) {
  return fastxm::info_nce_workspace_cuda(rows, columns);
}

void fwd(const void* sizes, const void* addresses, Address row_stats, std::int64_t row_stride,
         Address column_stats, Address workspace) {
  fastxm::info_nce_fwd_cuda(array<fastxm::InfoNceSizes>(sizes),
                            array<fastxm::InfoNceAddresses>(addresses), row_stats, row_stride,
                            column_stats, workspace, 0);
}

void bwd(const void* sizes, const void* addresses, Address row_terms, std::int64_t row_stride,
         Address column_terms, double smoothing, bool out_bf16, Address out) {
  fastxm::info_nce_bwd_cuda(array<fastxm::InfoNceSizes>(sizes),
                            array<fastxm::InfoNceAddresses>(addresses), row_terms, row_stride,
                            column_terms, smoothing, out_bf16, out, 0);
}

void small(const void* sizes, const void* addresses, double smoothing) {
  fastxm::info_nce_small_cuda(array<fastxm::InfoNceSmallSizes>(sizes),
                              array<fastxm::InfoNceSmallAddresses>(addresses), smoothing, 0);
}

}  // extern "C"
