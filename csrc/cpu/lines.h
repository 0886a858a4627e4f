// Memory in whole cache lines.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastxm {

inline std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// Asks for large pages where new memory is large: the system gives a page at its first touch, and
// thousands of small ones cost as much as the work that is done on them.
inline void prefer_large_pages(void* memory, std::int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::int64_t page = 4096, large = 1 << 22;
  const auto at =
      round_up(static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(memory)), page);
  if (bytes >= large)
    madvise(reinterpret_cast<void*>(at), (bytes - page) / page * page, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// n elements, uninitialised, of which the first begins a cache line
template <class T>
class Lines {
 public:
  explicit Lines(std::int64_t n = 0) : lines_(n ? new Line[(n * sizeof(T) + 63) / 64] : nullptr) {
    prefer_large_pages(lines_.get(), n * sizeof(T));
  }
  T* data() const { return reinterpret_cast<T*>(lines_.get()); }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::unique_ptr<Line[]> lines_;
};

}  // namespace fastxm
