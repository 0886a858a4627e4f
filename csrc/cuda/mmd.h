// MMD on a GPU, over device addresses and on a stream. Formula: fastxm/ops/mmd_tiles.py.
#pragma once

#include "../cpu/mmd.h"

namespace fastxm {

// As in cpu/mmd.h, but for what follows. A kernel has at most 64 parts, of degrees up to 255; its
// parameters are [2, parts], shapes and then weights. Nothing is added to: of a tile's rows there
// are sums of each of `strips`, x_potentials and x_slopes [strips, N]; of its columns those of each
// of `chunks`, y_potentials and y_slopes [chunks, M]. There are no sums of squares, and potentials
// are of the width of the rest.
std::array<std::int64_t, 2> mmd_parts_cuda(bool wide, std::int64_t N, std::int64_t M);

// Sums of a tile of products, and its weights; shapes of Gaussians ascend.
void mmd_tile_cuda(const MmdKernelNumbers& kernel, const MmdTileNumbers& tile,
                   std::uintptr_t stream);

// Derivatives [2, parts, strips x chunks], double, of a tile whose products are still there.
void mmd_derivatives_cuda(const MmdKernelNumbers& kernel, const MmdTileNumbers& tile,
                          std::uintptr_t stream);

}  // namespace fastxm
