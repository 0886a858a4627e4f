// What arrives from Python as a list of numbers of 8 bytes: addresses, sizes.
#pragma once

#include <cstring>

namespace fastxm {

// the numbers in the order of the struct's members, all of 8 bytes
template <class Struct, class Numbers>
Struct struct_of(const Numbers& numbers) {
  static_assert(sizeof(Struct) == sizeof(Numbers));
  Struct result;
  std::memcpy(&result, numbers.data(), sizeof result);
  return result;
}

}  // namespace fastxm
