// AMX's products on any CPU, for ctypes.
#include "amx_emulator.h"

#include "cpu/gemm_amx.h"

namespace fastxm {

void transpose(const void* from, std::int64_t stride, std::int64_t rows, std::int64_t columns,
               void* to, std::int64_t to_stride) {
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < columns; ++j)
      std::memcpy(static_cast<char*>(to) + 4 * (j * to_stride + i),
                  static_cast<const char*>(from) + 4 * (i * stride + j), 4);
}

}  // namespace fastxm

extern "C" {

bool is_right() { return fastxm::amx_is_right(); }

void multiply(std::uintptr_t panels, std::int64_t depth, std::uintptr_t a, std::int64_t row,
              std::int64_t step, std::int64_t rows, std::int64_t first, std::int64_t columns,
              std::uintptr_t out, std::int64_t stride, bool add) {
  fastxm::multiply_amx({true, depth, panels}, {fastxm::pointer<const void>(a), row, step}, rows,
                       first, columns, fastxm::pointer<float>(out), stride, add);
}

}  // extern "C"
