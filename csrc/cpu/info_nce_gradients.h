// InfoNCE's gradients: products of the logits' gradients. Those are made tile by tile where a
// product takes them: from what is kept for each product, else once for both.
#pragma once

#include <algorithm>

#include "cpu/info_nce_block.h"
#include "cpu/info_nce_products.h"

namespace fastxm {
namespace {

// Gradients of the logits of a block, times both factors: from what is kept of each tile, or made
// of products.
template <class E>
struct LogitGradients {
  const InfoNceBlock& b;
  Products make;
  Terms<float> terms;
  const Kept<E>* kept;  // or 0
  std::int64_t strips;

  // values [rows, kStrip] of the tile from row i and column j on, which is returned
  Tile<float> operator()(std::int64_t i, std::int64_t j, float* scratch, float* values) const {
    const Tile<float> t = tile_at(b, i, std::min(kTile<E>, b.rows - i), j, scratch);
    Terms<float> here = terms;
    here.rows += i;
    if (terms.columns) here.columns += j;
    const Kept<E>* own = kept ? kept + i / kTile<E> * strips + j / kStrip : nullptr;
    if (own && own->reference == own->reference) {
      kept_tile(t, here, *own, values);
    } else {
      make(t, i, j);
      bwd_tile(t, here, values, kStrip);
    }
    return t;
  }
};

// rows that the products with x take at a time, as those with y take kStrip columns: what they have
// of the gradients, of the other factor, and of sums stays in the second level of the cache
template <class E>
constexpr std::int64_t kRowsAtOnce = kStrip / kTile<E> * kTile<E>;

constexpr std::int64_t kApart = kStrip + 32;  // of rows of a strip, lest they share cache lines

// a tile's rows for products of whole steps: an odd last column and 0
template <class E>
void rows_for_products(const float* values, const Tile<float>& t, E* to) {
  tile_rows(values, t.rows, t.width, to, kApart);
  for (std::int64_t i = 0; t.width % kStep<E> && i < t.rows; ++i) to[i * kApart + t.width] = E{};
}

// Where the products with y have their gradients from, `rows` from row i on and a strip of columns
// from j on: made in `room`...
template <class E>
struct MadeRows {
  const LogitGradients<E>& ds;

  static std::int64_t room(std::int64_t rows) { return rows * kApart; }
  const E* operator()(std::int64_t i, std::int64_t rows, std::int64_t j, E* room) const {
    alignas(64) float scratch[kTile<E> * kStrip], values[kTile<E> * kStrip];
    for (std::int64_t k = 0; k < rows; k += kTile<E>)
      rows_for_products(values, ds(i + k, j, scratch, values), room + k * kApart);
    return room;
  }
};

// ... or left by the products with x: [strips, rows, kApart]
template <class E>
class LeftRows {
 public:
  LeftRows(std::int64_t rows, std::int64_t M)
      : rows_(rows), lines_(round_up(M, kStrip) / kStrip * rows * kApart) {}

  E* at(std::int64_t i, std::int64_t j) const {
    return lines_.data() + (j / kStrip * rows_ + i) * kApart;
  }

  static std::int64_t room(std::int64_t) { return 0; }
  const E* operator()(std::int64_t i, std::int64_t, std::int64_t j, E*) const { return at(i, j); }

 private:
  std::int64_t rows_;
  Lines<E> lines_;
};

template <class E>
constexpr std::int64_t kMostTiles = sizeof(E) == 2 ? 8 : 10;  // of rows that those with y take

// Products with y [M, D]: gradients of x.
template <class E>
class RowProducts {
 public:
  RowProducts(const E* y, std::int64_t M, std::int64_t D, int threads)
      : M_(M), D_(D), packed_((M + kDeep - 1) / kDeep * panels_size(D, kDeep)) {
    for (std::int64_t j = 0; j < M; j += kDeep)
      pack_rows(panels(j), y + j * D, std::min(kDeep, M - j), D, D, 0, threads);
  }

  // dx [rows, D] = gradients times y, of rows from `begin` on, and finished
  template <class Rows, class Out>
  void multiply(const Rows& ds, std::int64_t rows, Out* dx, const Finish<E>& end,
                std::int64_t begin, int threads) const {
    const std::int64_t tiles = (rows + kTile<E> - 1) / kTile<E>;
    // most of a part, whose sums stay in the second level of the cache; every thread has as many
    const std::int64_t most = std::clamp<std::int64_t>(
        (1 << 18) / (kTile<E> * std::max<std::int64_t>(1, D_)), 1, kMostTiles<E>);
    const std::int64_t parts = round_up((tiles + most - 1) / most, threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (std::int64_t p = 0; p < parts; ++p) {
      const auto edge = [&](std::int64_t q) { return (q * tiles + parts - 1) / parts * kTile<E>; };
      const std::int64_t i = edge(p), stop = std::min(rows, edge(p + 1));
      if (i < stop) multiply_part(ds, i, stop - i, dx + i * D_, end, begin + i);
    }
  }

 private:
  static constexpr std::int64_t kDeep = kStrip;

  // what of y the chunk of columns from j on is multiplied by
  Panels panels(std::int64_t j) const {
    Panels panels = panels_of(packed_.data(), round_up(std::min(kDeep, M_ - j), kStep<E>));
    panels.data += j / kDeep * panels_size(D_, kDeep) * sizeof(E);
    return panels;
  }

  template <class Rows, class Out>
  void multiply_part(const Rows& ds, std::int64_t first, std::int64_t rows, Out* dx,
                     const Finish<E>& end, std::int64_t row) const {
    constexpr bool direct = sizeof(Out) == 4;
    const std::int64_t stride = direct ? D_ : D_ + 16;
    Lines<E> room(ds.room(rows));
    Lines<float> sums(direct ? 0 : rows * stride);
    float* out = sums.data();
    if constexpr (direct) out = dx;
    if (M_ == 0) std::fill(out, out + rows * stride, 0.0f);
    for (std::int64_t j = 0; j < M_; j += kDeep)
      fastxm::multiply(panels(j), ds(first, rows, j, room.data()), kApart, rows, 0, D_, out, stride,
                       j > 0);
    finish_rows(end, row, rows, out, stride);
    if constexpr (!direct) round_rows(out, stride, rows, D_, dx, D_);
  }

  std::int64_t M_, D_;
  Lines<E> packed_;
};

// Products with x [N, D]: gradients of y. While they are added up they are transposed, [D, width]
// of each strip of columns; of many columns of float32 in the place of the gradients themselves.
template <class E, class Out>
class ColumnProducts {
 public:
  ColumnProducts(Out* dy, std::int64_t M, std::int64_t D)
      : dy_(dy), M_(M), D_(D), inside_(sizeof(Out) == 4 && M * D > kFew) {
    if (!inside_) room_ = Lines<float>(M * D);
    sums_ = room_.data();
    if constexpr (sizeof(Out) == 4) sums_ = inside_ ? dy : sums_;
  }

  // x's transpose times gradients, or that is added to what there is; left: where the gradients
  // go, or 0
  void add(const LogitGradients<E>& ds, const E* x, const LeftRows<E>* left, bool add,
           int threads) {
    const std::int64_t rows = ds.b.rows, deep = deep_of(rows);
    Lines<E> turned((rows + deep - 1) / deep * D_ * kTurned);
    const std::int64_t pieces = pieces_of(threads);
    const std::int64_t piece = std::max(kPanel, round_up((D_ + pieces - 1) / pieces, kPanel));
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2)
      for (std::int64_t i = 0; i < rows; i += deep)
        for (std::int64_t d = 0; d < D_; d += kPanel)
          turn(x + i * D_ + d, std::min(deep, rows - i), std::min(kPanel, D_ - d), D_,
               turned.data() + (i / deep * D_ + d) * kTurned, kTurned);
#pragma omp for collapse(2) schedule(dynamic)
      for (std::int64_t j = 0; j < M_; j += kStrip)
        for (std::int64_t d = 0; d < D_; d += piece)
          add_strip(ds, turned.data(), left, j, d, std::min(piece, D_ - d), add);
    }
  }

  void finish(const Finish<E>& end, int threads) const {
    const std::int64_t part = inside_ ? kStrip : kPanel;  // columns that are turned back at a time
#pragma omp parallel num_threads(threads)
    {
      Lines<float> room(part * D_);
#pragma omp for
      for (std::int64_t j = 0; j < M_; j += part) {
        const std::int64_t strip = j / kStrip * kStrip, width = std::min(kStrip, M_ - strip);
        const std::int64_t count = std::min(part, M_ - j);
        const float* sums = sums_ + strip * D_ + (j - strip);
        if (inside_) {
          std::copy_n(sums, width * D_, room.data());
          sums = room.data();
        }
        if constexpr (sizeof(Out) == 4) {
          transpose(sums, width, D_, count, dy_ + j * D_, D_);
          finish_rows(end, j, count, dy_ + j * D_, D_);
        } else {
          transpose(sums, width, D_, count, room.data(), D_);
          finish_rows(end, j, count, room.data(), D_);
          round_rows(room.data(), D_, count, D_, dy_ + j * D_, D_);
        }
      }
    }
  }

 private:
  static constexpr std::int64_t kMost = (kStrip + kTile<E> - 1) / kTile<E> * kTile<E>;
  static constexpr std::int64_t kTurned = kRowsAtOnce<E> + 32;
  static constexpr std::int64_t kFew = 1 << 20;  // sums that may have a place of their own: 4 MB

  // Where strips would leave threads without work, several take the same one, and of its sums some
  // features each: every piece makes the strip's gradients again, an eighth of its product's time
  // (a half by AMX, which multiplies that much faster).
  std::int64_t pieces_of(int threads) const {
    const std::int64_t strips = (M_ + kStrip - 1) / kStrip, panels = (D_ + kPanel - 1) / kPanel;
    std::int64_t best = 1;
    const double product = sizeof(E) == 2 && gemm_amx() ? 2 : 8;
    double least = INFINITY;
    for (std::int64_t n = 1; n <= std::clamp<std::int64_t>(panels, 1, threads); ++n) {
      const std::int64_t rounds = (strips * n + threads - 1) / threads;
      const double time = static_cast<double>(rounds) * (product / static_cast<double>(n) + 1);
      if (time < least) least = time, best = n;
    }
    return best;
  }

  // rows at a time; a few more where that are all, lest few take a pass of their own
  static std::int64_t deep_of(std::int64_t rows) { return rows <= kMost ? kMost : kRowsAtOnce<E>; }

  // to the sums of `count` features, from d on, of the strip of columns from j on
  void add_strip(const LogitGradients<E>& ds, const E* turned, const LeftRows<E>* left,
                 std::int64_t j, std::int64_t d, std::int64_t count, bool add) const {
    alignas(64) float scratch[kTile<E> * kStrip], values[kTile<E> * kStrip];
    Lines<E> chunk(panels_size(kStrip, kMost));
    const std::int64_t width = std::min(kStrip, M_ - j), deep = deep_of(ds.b.rows);
    for (std::int64_t i = 0; i < ds.b.rows; i += deep, turned += D_ * kTurned) {
      const std::int64_t rows = std::min(deep, ds.b.rows - i), depth = round_up(rows, kStep<E>);
      for (std::int64_t k = 0; k < rows; k += kTile<E>) {
        const Tile<float> t = ds(i + k, j, scratch, values);
        tile_steps(values, t.rows, t.width, chunk.data() + k * kPanel, depth * kPanel);
        if (left && d == 0) rows_for_products(values, t, left->at(i + k, j));
      }
      multiply(panels_of(chunk.data(), depth), turned + d * kTurned, kTurned, count, 0, width,
               sums_ + j * D_ + d * width, width, add || i > 0);
    }
  }

  Out* dy_;
  std::int64_t M_, D_;
  bool inside_;
  Lines<float> room_;
  float* sums_;
};

}  // namespace
}  // namespace fastxm
