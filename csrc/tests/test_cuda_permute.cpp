// SPDX-License-Identifier: Apache-2.0
// permute on CUDA, run by the emulator, against copies of rows.
#include <cstring>

#include "kernel_check.h"
#include "sparse_unified/cuda/permute.h"

namespace sparse_unified::test {
namespace {

struct Shape {
  int64_t num_tokens;
  int64_t num_rows;
  int64_t row_bytes;
  int64_t padding;  // bytes between the rows of x
  int64_t lead;     // bytes before the first row of x and y
};

// Bytes at an address that is `lead` beyond a multiple of 16.
class Bytes {
 public:
  Bytes(int64_t size, int64_t lead) : array_(size, lead), size_(size) {}
  unsigned char* get() { return array_.get(); }
  int64_t size() const { return size_; }

 private:
  Array<unsigned char> array_;
  int64_t size_;
};

void test_permute(const Shape& shape, Random& random) {
  const int64_t stride = shape.row_bytes + shape.padding;
  Bytes x(shape.num_tokens ? shape.num_tokens * stride - shape.padding : 0, shape.lead);
  Bytes y(shape.num_rows * shape.row_bytes, shape.lead);
  Array<int32_t> row_token(shape.num_rows);
  for (int64_t i = 0; i < x.size(); ++i) x.get()[i] = static_cast<unsigned char>(random() % 251);
  for (int64_t r = 0; r < shape.num_rows; ++r) {
    row_token[r] = static_cast<int32_t>(random() % static_cast<uint64_t>(shape.num_tokens));
  }
  if (y.size() > 0) std::memset(y.get(), 0xff, static_cast<size_t>(y.size()));
  const PermuteCudaParams params{x.get(),         stride,         row_token.get(), y.get(),
                                 shape.row_bytes, shape.num_rows, shape.num_tokens};
  next_schedule();
  check_launch("permute", permute_cuda(params, nullptr));
  for (int64_t i = 0; i < y.size(); ++i) {
    const int64_t token = row_token[i / shape.row_bytes];
    check_equal("y", i, y.get()[i], x.get()[token * stride + i % shape.row_bytes]);
  }
}

// A token outside [0, T) on either side.
void test_bad_token(int32_t bad) {
  Array<float> x(8);
  Array<float> y(12);
  Array<int32_t> row_token(3);
  row_token[1] = bad;
  check_stops("a token out of range", [&] {
    (void)permute_cuda({x.get(), 16, row_token.get(), y.get(), 16, 3, 2}, nullptr);
  });
}

void run_all() {
  Random random(11);
  for (const int64_t num_tokens : {1, 37}) {
    for (const int64_t num_rows : {0, 1, 37, 200}) {
      // Rows of 16-byte units, in one step of the main loop and more, and of every smaller unit.
      for (const int64_t row_bytes : {16, 2032, 2048, 2064, 4112}) {
        test_permute({num_tokens, num_rows, row_bytes, 0, 0}, random);
        test_permute({num_tokens, num_rows, row_bytes, 48, 0}, random);
      }
      for (const int64_t unit : {1, 2, 4, 8}) {
        test_permute({num_tokens, num_rows, 37 * unit, 0, 0}, random);  // rows
        test_permute({num_tokens, num_rows, 320, unit, 0}, random);     // stride
        test_permute({num_tokens, num_rows, 320, 0, unit}, random);     // addresses
        test_permute({num_tokens, num_rows, 133 * unit, unit, unit}, random);
      }
    }
  }
  test_permute({0, 0, 64, 0, 0}, random);
  test_permute({3, 5, 0, 0, 0}, random);
  test_bad_token(-1);
  test_bad_token(2);
}

}  // namespace
}  // namespace sparse_unified::test

int main() {
  return sparse_unified::test::run_tests("cuda permute", sparse_unified::test::run_all);
}
