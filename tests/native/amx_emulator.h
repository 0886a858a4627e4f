// The instructions of AMX as functions over plain memory; what a processor would refuse ends the
// process.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulator {

struct Tile {
  int rows, bytes;
  std::uint32_t data[16][16];
};

inline thread_local Tile tiles[8];

inline void demand(bool holds) {
  if (!holds) std::abort();
}

inline Tile& tile(int i) {
  demand(tiles[i].rows > 0);
  return tiles[i];
}

inline void load_config(const void* from) {
  std::uint8_t bytes[64];
  std::memcpy(bytes, from, 64);
  demand(bytes[0] == 1 && bytes[1] == 0);
  for (int i = 2; i < 16; ++i) demand(bytes[i] == 0);
  for (int i = 0; i < 16; ++i) {
    const int width = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, rows = bytes[48 + i];
    demand(i < 8 ? width <= 64 && rows <= 16 && (width > 0) == (rows > 0) : !width && !rows);
    if (i < 8) tiles[i] = {rows, width, {}};
  }
}

inline void release() {
  for (Tile& t : tiles) t = {};
}

inline void zero(int i) { tile(i) = {tile(i).rows, tile(i).bytes, {}}; }

inline void load(int i, const void* from, std::int64_t stride) {
  zero(i);
  for (int r = 0; r < tiles[i].rows; ++r)
    std::memcpy(tiles[i].data[r], static_cast<const char*>(from) + r * stride, tiles[i].bytes);
}

inline void store(int i, void* to, std::int64_t stride) {
  for (int r = 0; r < tile(i).rows; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, tiles[i].data[r], tiles[i].bytes);
}

inline float value(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void multiply(int sums, int left, int right) {
  Tile &c = tile(sums), &a = tile(left), &b = tile(right);
  demand(c.rows == a.rows && c.bytes == b.bytes && a.bytes == 4 * b.rows);
  demand(sums != left && sums != right && left != right);
  for (int m = 0; m < c.rows; ++m)
    for (int k = 0; k < b.rows; ++k)
      for (int n = 0; n < c.bytes / 4; ++n) {
        float sum = value(c.data[m][n]);
        const std::uint32_t x = a.data[m][k], y = b.data[k][n];
        sum += value(x << 16) * value(y << 16);
        sum += value(x & 0xffff0000u) * value(y & 0xffff0000u);
        std::memcpy(&c.data[m][n], &sum, 4);
      }
}

}  // namespace emulator

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) emulator::load_config(from)
#define _tile_release() emulator::release()
#define _tile_loadd(i, from, stride) emulator::load(i, from, stride)
#define _tile_stored(i, to, stride) emulator::store(i, to, stride)
#define _tile_zero(i) emulator::zero(i)
#define _tile_dpbf16ps(sums, left, right) emulator::multiply(sums, left, right)
