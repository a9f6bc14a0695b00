// The coders for Python: flat arrays in, bytes out, and back. All work is done without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include "bitshift.hpp"
#include "floats.hpp"
#include "huffman.hpp"
#include "search.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace tersor {
namespace {

template <class T>
using Flat = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Output = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Shapes = nb::ndarray<const uint32_t, nb::shape<-1, 4>, nb::c_contig, nb::device::cpu>;
using Frequencies = nb::ndarray<const uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::vector<Shape> checked_shapes(const Shapes& shapes, size_t count) {
  std::vector<Shape> found;
  uint64_t total = 0;
  for (size_t i = 0; i < shapes.shape(0); ++i) {
    const uint32_t* at = shapes.data() + 4 * i;
    Shape shape{at[0], at[1], at[2], at[3]};
    if (shape.kernel == 0 || shape.columns % shape.kernel) {
      throw std::invalid_argument("kernel must divide the columns");
    }
    trellis_of(shape.states);
    if (shape.rows > 0x7fffffff || shape.columns > 0x7fffffff) {
      throw std::invalid_argument("a matrix has too many rows or columns");
    }
    total += uint64_t{shape.rows} * shape.columns;
    if (total > count) break;
    found.push_back(shape);
  }
  if (total != count) throw std::invalid_argument("the shapes and the codes differ in size");
  return found;
}

nb::bytes as_bytes(const Bytes& bytes) {
  return nb::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

template <class Model, class Value>
Bytes encode_with(const Value* codes, const std::vector<Shape>& shapes) {
  RangeEncoder range;
  auto model = std::make_unique<Model>();
  // The encoder only reads them.
  code_matrices(range, *model, const_cast<Value*>(codes), shapes);
  return range.finish();
}

template <class Model, class Value>
void decode_with(Span data, Value* codes, const std::vector<Shape>& shapes) {
  RangeDecoder range(data);
  auto model = std::make_unique<Model>();
  code_matrices(range, *model, codes, shapes);
  range.finish();
}

nb::bytes adaptive_encode(const Flat<int32_t>& codes, const Shapes& shapes, bool mixed) {
  auto checked = checked_shapes(shapes, codes.size());
  Bytes out;
  {
    nb::gil_scoped_release free;
    out = mixed ? encode_with<Mixed>(codes.data(), checked)
                : encode_with<Small>(codes.data(), checked);
  }
  return as_bytes(out);
}

template <class Value>
void adaptive_decode(const Flat<uint8_t>& data, const Shapes& shapes, const Output<Value>& codes,
                     bool mixed) {
  auto checked = checked_shapes(shapes, codes.size());
  Span span{data.data(), data.size()};
  nb::gil_scoped_release free;
  mixed ? decode_with<Mixed>(span, codes.data(), checked)
        : decode_with<Small>(span, codes.data(), checked);
}

nb::bytes encode_rans(const Flat<uint8_t>& symbols, const Flat<uint8_t>& tables,
                      const Frequencies& frequency, int table_bits) {
  if (symbols.size() != tables.size()) throw std::invalid_argument("sizes differ");
  if (table_bits < kLeastTableBits || table_bits > kMostTableBits) {
    throw std::invalid_argument("table_bits must be 10 to 14");
  }
  Bytes out;
  {
    nb::gil_scoped_release free;
    out = rans_encode(symbols.data(), tables.data(), symbols.size(), frequency.data(),
                      static_cast<uint32_t>(frequency.shape(0)),
                      static_cast<uint32_t>(frequency.shape(1)), table_bits);
  }
  return as_bytes(out);
}

template <class Value>
void decode_fast(const Flat<uint8_t>& data, const Shapes& shapes, const Output<Value>& codes) {
  auto checked = checked_shapes(shapes, codes.size());
  nb::gil_scoped_release free;
  fast_decode<Value>({data.data(), data.size()}, checked, codes.data(), codes.size());
}

nb::bytes encode_huffman(const Flat<uint8_t>& symbols, const std::vector<int32_t>& lengths) {
  for (int32_t length : lengths) {
    if (length < 0 || length > kMostLength) throw std::invalid_argument("a code is too long");
  }
  Bytes out;
  {
    nb::gil_scoped_release free;
    out = huffman_bits(symbols.data(), symbols.size(), lengths);
  }
  return as_bytes(out);
}

template <class Value>
void decode_huffman(const Flat<uint8_t>& data, const Output<Value>& codes) {
  nb::gil_scoped_release free;
  huffman_decode<Value>({data.data(), data.size()}, codes.data(), codes.size());
}

template <class T>
using Table = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// `feedback`, `row_feedback` and `zeros` may have no elements, for none.
void search(const Table<float>& levels, const Table<float>& feedback, const Flat<float>& weights,
            const Table<float>& row_feedback, const Flat<float>& row_weights,
            const Table<uint8_t>& classes, const Table<float>& bits, const Table<uint8_t>& zeros,
            const std::vector<int>& trellis, float rate, const Output<int32_t>& codes,
            const Output<double>& costs, size_t threads) {
  size_t rows = levels.shape(0), columns = levels.shape(1), size = rows * columns;
  auto none_or = [](size_t found, size_t wanted) { return found == 0 || found == wanted; };
  if (!none_or(feedback.size(), columns * columns) || weights.size() != columns ||
      !none_or(row_feedback.size(), rows * rows) || row_weights.size() != rows ||
      classes.size() != size || !none_or(zeros.size(), size) || codes.size() != size ||
      costs.size() != rows || bits.size() == 0) {
    throw std::invalid_argument("sizes differ");
  }
  if (trellis.size() != 3 || trellis[0] < 1 || trellis[0] > kMostStates ||
      ((trellis[1] | trellis[2] | 0) >= std::max(2, trellis[0]))) {
    throw std::invalid_argument("no such trellis");
  }
  for (size_t i = 0; i < size; ++i) {
    if (size_t{classes.data()[i]} * 2 + 1 >= bits.shape(0)) {
      throw std::invalid_argument("a class has no bits");
    }
  }
  Search task{rows, columns, levels.data(), feedback.size() ? feedback.data() : nullptr,
              weights.data(), row_feedback.size() ? row_feedback.data() : nullptr,
              row_weights.data(), classes.data(), bits.data(), bits.shape(1),
              zeros.size() ? zeros.data() : nullptr, trellis[0], trellis[1], trellis[2], rate};
  nb::gil_scoped_release free;
  search_rows(task, codes.data(), costs.data(), threads);
}

void search_rings(const Table<float>& values, const Table<float>& weights, const Flat<float>& table,
                  int bits, int state_bits, size_t reach, const Output<uint8_t>& codes,
                  size_t threads) {
  size_t rings = values.shape(0), length = values.shape(1);
  if (bits < 1 || bits > kMostBits || state_bits < kLeastStateBits ||
      state_bits > kMostStateBits) {
    throw std::invalid_argument("no such trellis");
  }
  if (weights.shape(0) != rings || weights.shape(1) != length ||
      table.size() != size_t{1} << state_bits || codes.size() != rings * length) {
    throw std::invalid_argument("sizes differ");
  }
  if (reach > length / 2 || length * static_cast<size_t>(bits) < static_cast<size_t>(state_bits)) {
    throw std::invalid_argument("a ring is too short");
  }
  Bitshift task{rings, length, values.data(), weights.data(), table.data(), bits, state_bits,
                reach};
  nb::gil_scoped_release free;
  bitshift_search(task, codes.data(), threads);
}

template <class Float>
void decode_floats(const Flat<uint8_t>& data, const Shapes& shapes, const Flat<uint8_t>& rest,
                   int center, const Output<typename Float::Bits>& out) {
  auto checked = checked_shapes(shapes, out.size());
  if (out.size() == 0 || rest.size() != out.size() * (sizeof(typename Float::Bits) - 1)) {
    throw std::invalid_argument("sizes differ");
  }
  nb::gil_scoped_release free;
  floats_decode<Float>({data.data(), data.size()}, checked, rest.data(), center, out.data(),
                       out.size());
}

// For tests: all paths must give the same bytes.
bool use_wide(bool used) { return wide().exchange(used && has_avx2()); }

NB_MODULE(_native, module) {
  module.def("use_wide", use_wide, "used"_a);
  module.def("adaptive_encode", adaptive_encode, "codes"_a, "shapes"_a, "mixed"_a);
  module.def("adaptive_decode", adaptive_decode<int8_t>, "data"_a, "shapes"_a,
             "codes"_a.noconvert(), "mixed"_a);
  module.def("adaptive_decode", adaptive_decode<int16_t>, "data"_a, "shapes"_a,
             "codes"_a.noconvert(), "mixed"_a);
  module.def("adaptive_decode", adaptive_decode<int32_t>, "data"_a, "shapes"_a,
             "codes"_a.noconvert(), "mixed"_a);
  module.def("rans_encode", encode_rans, "symbols"_a, "tables"_a, "frequency"_a, "table_bits"_a);
  module.def("fast_decode", decode_fast<int8_t>, "data"_a, "shapes"_a, "codes"_a.noconvert());
  module.def("fast_decode", decode_fast<int16_t>, "data"_a, "shapes"_a, "codes"_a.noconvert());
  module.def("fast_decode", decode_fast<int32_t>, "data"_a, "shapes"_a, "codes"_a.noconvert());
  module.def("huffman_bits", encode_huffman, "symbols"_a, "lengths"_a);
  module.def("huffman_decode", decode_huffman<int8_t>, "data"_a, "codes"_a.noconvert());
  module.def("huffman_decode", decode_huffman<int16_t>, "data"_a, "codes"_a.noconvert());
  module.def("huffman_decode", decode_huffman<int32_t>, "data"_a, "codes"_a.noconvert());
  module.def("search", search, "levels"_a, "feedback"_a, "weights"_a, "row_feedback"_a,
             "row_weights"_a, "classes"_a, "bits"_a,
             "zeros"_a, "trellis"_a, "rate"_a, "codes"_a.noconvert(), "costs"_a.noconvert(),
             "threads"_a);
  module.def("bitshift_search", search_rings, "values"_a, "weights"_a, "table"_a, "bits"_a,
             "state_bits"_a, "reach"_a, "codes"_a.noconvert(), "threads"_a);
  module.def("bfloat16_decode", decode_floats<Bfloat16>, "data"_a, "shapes"_a,
             "rest"_a, "center"_a, "out"_a.noconvert());
  module.def("float32_decode", decode_floats<Float32>, "data"_a, "shapes"_a,
             "rest"_a, "center"_a, "out"_a.noconvert());
  module.def("float16_decode", decode_floats<Float16>, "data"_a, "shapes"_a,
             "rest"_a, "center"_a, "out"_a.noconvert());
}

}  // namespace
}  // namespace tersor
