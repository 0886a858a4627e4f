// Memory in whole cache lines.
#pragma once

#include <cstdint>
#include <memory>

namespace fastxm {

inline std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// n elements, uninitialised, of which the first begins a cache line
template <class T>
class Lines {
 public:
  explicit Lines(std::int64_t n = 0) : lines_(n ? new Line[(n * sizeof(T) + 63) / 64] : nullptr) {}
  T* data() const { return reinterpret_cast<T*>(lines_.get()); }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::unique_ptr<Line[]> lines_;
};

}  // namespace fastxm
