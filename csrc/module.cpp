// fastxm._C: every native kernel as a plain function over addresses, sizes and strides.
// The front doors in fastxm/ops check and allocate; nothing here knows of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <cstdlib>
#include <limits>
#include <string>

#include "cpu/gemm.h"
#include "cpu/info_nce.h"
#include "cpu/mmd.h"
#include "cpu/modulation.h"
#include "cpu/region_word.h"
#include "cpu/siglip.h"
#include "cpu/simd.h"
#ifdef FASTXM_CUDA
#include "cuda/info_nce.h"
#include "cuda/mmd.h"
#include "cuda/modulation.h"
#include "cuda/region_word.h"
#endif

namespace py = pybind11;

namespace {

using release = py::call_guard<py::gil_scoped_release>;

py::dict build_info() {
  py::dict info;
#ifdef FASTXM_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["compiler"] = __VERSION__;
  info["cpu"] = std::string(fastxm::cpu_level()) + (fastxm::gemm_amx() ? ", amx" : "");
  return info;
}

bool keep_freed_memory() {
#ifdef __GLIBC__
  // glibc before 2.35 takes no more than 32 MiB
  bool kept = mallopt(M_MMAP_THRESHOLD, 1 << 30) == 1 || mallopt(M_MMAP_THRESHOLD, 32 << 20) == 1;
  return kept && mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max()) == 1;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fastxm.";
  const char* asked = std::getenv("FASTXM_CPU_LEVEL");
  const std::string level = asked ? asked : "x86-64";
  if (level != "avx512" && level != "avx2" && level != "x86-64")
    throw py::import_error("FASTXM_CPU_LEVEL is avx512, avx2 or x86-64, not " + level);
  m.def("build_info", &build_info, "What was built and the instruction set used on this machine.");
  m.def("keep_freed_memory", &keep_freed_memory,
        "Lets the process keep the memory that it frees (glibc before 2.35: blocks up to 32 MiB); "
        "false where malloc is not glibc's.");
  m.def("gemm_cpu", &fastxm::gemm_cpu, release());
  m.def("gemm_level", &fastxm::gemm_level, "Element of the widest tile kernel of this machine.");
  m.def("gemm_pack_cpu", &fastxm::gemm_pack_cpu, release());
  m.def("gemm_pack_rows_cpu", &fastxm::gemm_pack_rows_cpu, release());
  m.def("info_nce_fwd_cpu", &fastxm::info_nce_fwd_cpu, release());
  m.def("info_nce_bwd_cpu", &fastxm::info_nce_bwd_cpu, release());
  m.def("info_nce_kept_cpu", &fastxm::info_nce_kept_cpu, release());
  m.def("info_nce_losses_cpu", &fastxm::info_nce_losses_cpu, release());
  m.def("info_nce_losses_bwd_cpu", &fastxm::info_nce_losses_bwd_cpu, release());
  m.def("info_nce_rnorms_cpu", &fastxm::info_nce_rnorms_cpu, release());
  m.def("info_nce_sums_cpu", &fastxm::info_nce_sums_cpu, release());
  m.def("info_nce_sums_bwd_cpu", &fastxm::info_nce_sums_bwd_cpu, release());
  m.def("mmd_problems_cpu", &fastxm::mmd_problems_cpu, release());
  m.def("mmd_samples_cpu", &fastxm::mmd_samples_cpu, release());
  m.def("mmd_tile_cpu", &fastxm::mmd_tile_cpu, release());
  m.def("modulation_cpu", &fastxm::modulation_cpu, release());
  m.def("region_word_attention_cpu", &fastxm::region_word_attention_cpu, release());
  m.def("region_word_bwd_cpu", &fastxm::region_word_bwd_cpu, release());
  m.def("region_word_pool_cpu", &fastxm::region_word_pool_cpu, release());
  m.def("region_word_tiles_bwd_cpu", &fastxm::region_word_tiles_bwd_cpu, release());
  m.def("region_word_tiles_fwd_cpu", &fastxm::region_word_tiles_fwd_cpu, release());
  m.def("siglip_cpu", &fastxm::siglip_cpu, release());
#ifdef FASTXM_CUDA
  m.def("info_nce_workspace_cuda", &fastxm::info_nce_workspace_cuda, release());
  m.def("info_nce_fwd_cuda", &fastxm::info_nce_fwd_cuda, release());
  m.def("info_nce_bwd_cuda", &fastxm::info_nce_bwd_cuda, release());
  m.def("info_nce_rnorms_cuda", &fastxm::info_nce_rnorms_cuda, release());
  m.def("info_nce_finish_cuda", &fastxm::info_nce_finish_cuda, release());
  m.def("info_nce_small_cuda", &fastxm::info_nce_small_cuda, release());
  m.def("mmd_derivatives_cuda", &fastxm::mmd_derivatives_cuda, release());
  m.def("mmd_parts_cuda", &fastxm::mmd_parts_cuda, release());
  m.def("mmd_tile_cuda", &fastxm::mmd_tile_cuda, release());
  m.def("modulation_cuda", &fastxm::modulation_cuda, release());
  m.def("region_word_attention_cuda", &fastxm::region_word_attention_cuda, release());
  m.def("region_word_bwd_cuda", &fastxm::region_word_bwd_cuda, release());
  m.def("region_word_pool_cuda", &fastxm::region_word_pool_cuda, release());
#endif
}
