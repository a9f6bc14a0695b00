// Decodes mutated and random streams: each must be refused or decoded, within what it may allocate.
//
// fuzz [streams] [seed]
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "floats.hpp"
#include "huffman.hpp"

using namespace tersor;

namespace {

using Random = std::mt19937_64;

enum Kind { kSmall, kMixed, kFast, kFastNarrow, kHuffman, kHuffmanNarrow, kKinds };

uint32_t below(Random& random, uint32_t count) { return static_cast<uint32_t>(random() % count); }

std::vector<Shape> some_shapes(Random& random) {
  static constexpr uint32_t kernels[] = {1, 9, 25, 4, 49, 3};
  std::vector<Shape> shapes(1 + below(random, 3));
  for (Shape& shape : shapes) {
    shape.kernel = kernels[below(random, 6)];
    shape.columns = shape.kernel * below(random, 12);
    shape.rows = below(random, 12);
  }
  return shapes;
}

size_t total(const std::vector<Shape>& shapes) {
  size_t size = 0;
  for (Shape shape : shapes) size += shape.size();
  return size;
}

std::vector<int32_t> some_codes(Random& random, size_t count) {
  std::vector<int32_t> codes(count);
  uint32_t most = 1u << below(random, 9);
  for (int32_t& code : codes) {
    code = static_cast<int32_t>(below(random, most)) - static_cast<int32_t>(most / 2);
    if (below(random, 200) == 0) code *= 1000003;
  }
  return codes;
}

template <template <class> class Model>
Bytes adaptive(std::vector<int32_t> codes, const std::vector<Shape>& shapes) {
  RangeEncoder range;
  auto model = std::make_unique<Model<RangeEncoder>>(range);
  int32_t* at = codes.data();
  for (Shape shape : shapes) {
    code_matrix<RangeEncoder>(*model, at, shape);
    at += shape.size();
  }
  return range.finish();
}

Bytes part(const Bytes& bytes) {
  Bytes out;
  size_t size = bytes.size();
  for (; size > 127; size >>= 7) out.push_back(static_cast<uint8_t>(size & 127) | 128);
  out.push_back(static_cast<uint8_t>(size));
  out.insert(out.end(), bytes.begin(), bytes.end());
  return out;
}

void join(Bytes& out, const Bytes& more) { out.insert(out.end(), more.begin(), more.end()); }

class SideWriter {
 public:
  SideWriter() : model_(std::make_unique<Small<RangeEncoder>>(range_)) {}

  void add(std::vector<int32_t> codes, Shape shape) {
    code_matrix<RangeEncoder>(*model_, codes.data(), shape);
  }
  void row(const std::vector<int32_t>& codes) {
    add(codes, Shape{1, static_cast<uint32_t>(codes.size()), 1});
  }
  Bytes finish() { return range_.finish(); }

 private:
  RangeEncoder range_;
  std::unique_ptr<Small<RangeEncoder>> model_;
};

// The symbols of codes, with escapes in the stream's own alphabet of 64.
std::vector<uint8_t> symbols_of(const std::vector<int32_t>& codes, std::vector<int32_t>& escaped) {
  std::vector<uint8_t> symbols;
  for (int64_t code : codes) {
    int64_t folded = code < 0 ? -2 * code - 1 : 2 * code;
    if (folded >= 63) escaped.push_back(static_cast<int32_t>(code));
    symbols.push_back(static_cast<uint8_t>(std::min<int64_t>(folded, 63)));
  }
  return symbols;
}

Bytes escapes(const std::vector<int32_t>& escaped) {
  SideWriter writer;
  writer.row(escaped);
  return writer.finish();
}

Bytes fast(Random& random, const std::vector<int32_t>& codes, const std::vector<Shape>& shapes) {
  if (codes.empty()) return {};
  std::vector<int32_t> escaped;
  auto symbols = symbols_of(codes, escaped);
  int tables = 1 + static_cast<int>(below(random, 16));
  SideWriter side;
  side.row({tables - 1, 2, 63, 1});
  std::vector<Layout> layouts;
  for (Shape shape : shapes) {
    layouts.push_back(Layout{shape, static_cast<int>(below(random, 4)), {}, {}});
    if (tables == 1 || !shape.size()) continue;
    Layout& layout = layouts.back();
    int mode = static_cast<int>(below(random, 4));
    side.row({mode, layout.base});
    auto classes = [&](uint32_t count) {
      std::vector<int32_t> values(count);
      for (int32_t& value : values) value = static_cast<int32_t>(below(random, 5)) - 2;
      side.row(values);
      return values;
    };
    if (mode & 1) layout.row = classes(shape.rows);
    if (mode & 2) {
      auto channel = classes(shape.columns / shape.kernel);
      auto place = shape.kernel > 1 ? classes(shape.kernel) : std::vector<int32_t>{0};
      for (int32_t value : channel) {
        for (int32_t more : place) layout.column.push_back(value + more);
      }
    }
  }
  std::vector<int32_t> weights(size_t(tables) * 64, 0);
  weights[0] = 20;  // all symbols of all tables alike
  side.add(weights, Shape{static_cast<uint32_t>(tables), 64, 1});
  std::vector<uint32_t> frequency(weights.size(), (1u << 12) / 64);
  std::vector<uint8_t> places(codes.size(), 0);
  if (tables > 1) Positions(layouts, tables).fill(places.data(), places.size());
  Bytes out = part(side.finish());
  join(out, part(escapes(escaped)));
  join(out, rans_encode(symbols.data(), places.data(), symbols.size(), frequency.data(),
                        static_cast<uint32_t>(tables), 64, 12));
  return out;
}

Bytes huffman(const std::vector<int32_t>& codes) {
  if (codes.empty()) return {};
  std::vector<int32_t> escaped;
  auto symbols = symbols_of(codes, escaped);
  std::vector<int32_t> lengths(64, 6);
  SideWriter side;
  side.row({63, 1});
  side.row(lengths);
  Bytes out = part(side.finish());
  join(out, part(escapes(escaped)));
  join(out, huffman_bits(symbols.data(), symbols.size(), lengths));
  return out;
}

void decode(Kind kind, Span data, const std::vector<Shape>& shapes, std::vector<int32_t>& codes) {
  std::vector<int8_t> narrow(codes.size());
  switch (kind) {
    case kSmall:
    case kMixed: {
      RangeDecoder range(data);
      auto small = std::make_unique<Small<RangeDecoder>>(range);
      auto mixed = std::make_unique<Mixed<RangeDecoder>>(range);
      int32_t* at = codes.data();
      for (Shape shape : shapes) {
        kind == kSmall ? code_matrix<RangeDecoder>(*small, at, shape)
                       : code_matrix<RangeDecoder>(*mixed, at, shape);
        at += shape.size();
      }
      range.finish();
      break;
    }
    case kFast:
      fast_decode<int32_t>(data, shapes, codes.data(), codes.size());
      break;
    case kFastNarrow:
      fast_decode<int8_t>(data, shapes, narrow.data(), narrow.size());
      break;
    case kHuffman:
      huffman_decode<int32_t>(data, codes.data(), codes.size());
      break;
    default:
      huffman_decode<int8_t>(data, narrow.data(), narrow.size());
  }
}

void mutate(Random& random, Bytes& data) {
  int changes = 1 + static_cast<int>(below(random, 4));
  for (int i = 0; i < changes; ++i) {
    size_t at = data.empty() ? 0 : random() % data.size();
    switch (data.empty() ? 2 : below(random, 6)) {
      case 0: data[at] ^= static_cast<uint8_t>(1u << below(random, 8)); break;
      case 1: data[at] = static_cast<uint8_t>(random()); break;
      case 2: data.insert(data.begin() + at, static_cast<uint8_t>(random())); break;
      case 3: data.erase(data.begin() + at); break;
      case 4: data.resize(at); break;
      default: data[at] = below(random, 2) ? 0 : 255;
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  uint64_t streams = count > 1 ? std::stoull(arguments[1]) : 200000;
  Random random(count > 2 ? std::stoull(arguments[2]) : 0);
  uint64_t done = 0, refused = 0;
  while (done < streams) {
    auto shapes = some_shapes(random);
    auto codes = some_codes(random, total(shapes));
    Kind kind = static_cast<Kind>(below(random, kKinds));
    Bytes whole = kind == kSmall   ? adaptive<Small>(codes, shapes)
                  : kind == kMixed ? adaptive<Mixed>(codes, shapes)
                  : kind <= kFastNarrow ? fast(random, codes, shapes)
                                        : huffman(codes);
    std::vector<int32_t> back(codes.size());
    if (kind != kFastNarrow && kind != kHuffmanNarrow) {
      decode(kind, {whole.data(), whole.size()}, shapes, back);
      if (back != codes) {
        std::printf("kind %d does not give its codes back\n", kind);
        return 1;
      }
    }
    for (int i = 0; i < 40 && done < streams; ++i, ++done) {
      Bytes data = whole;
      if (below(random, 20) == 0) {
        for (uint8_t& byte : data) byte = static_cast<uint8_t>(random());
      } else {
        mutate(random, data);
      }
      // An own copy of the exact size, so that reading beyond it is seen.
      std::unique_ptr<uint8_t[]> exact(new uint8_t[data.size()]);
      std::copy(data.begin(), data.end(), exact.get());
      try {
        decode(kind, {exact.get(), data.size()}, shapes, back);
      } catch (const Malformed&) {
        ++refused;
      }
    }
  }
  std::printf("%llu streams: %llu refused, %llu decoded, none of them out of bounds\n",
              static_cast<unsigned long long>(done), static_cast<unsigned long long>(refused),
              static_cast<unsigned long long>(done - refused));
  return 0;
}
