#pragma once

#include "../cpu/modulation.h"

namespace fastxm {

// the passes of cpu/modulation.h over device addresses, on a stream
void modulation_cuda(int pass, const ModulationSizes& sizes, const ModulationAddresses& addresses,
                     std::uintptr_t stream);

}  // namespace fastxm
