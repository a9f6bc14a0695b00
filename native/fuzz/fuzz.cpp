// Decodes mutated and random streams: each must be refused or decoded, the same with and without
// AVX2, and within the memory that decoders may take.
//
// fuzz [seconds] [seed]
#include <malloc.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <random>
#include <string>

#include "floats.hpp"
#include "huffman.hpp"

namespace {
size_t held = 0, most_held = 0;
}

void* operator new(size_t size) {
  void* found = std::malloc(size ? size : 1);
  if (!found) throw std::bad_alloc();
  held += malloc_usable_size(found);
  most_held = std::max(most_held, held);
  return found;
}

void operator delete(void* old) noexcept {
  if (old) held -= malloc_usable_size(old);
  std::free(old);
}

void operator delete(void* old, size_t) noexcept { operator delete(old); }

using namespace tersor;

namespace {

using Random = std::mt19937_64;

enum class Coder { kSmall, kMax, kFast, kHuffman, kFloats };
enum class Type { kInt8, kInt16, kInt32 };

// What a stream is decoded as.
struct Kind {
  Coder coder;
  Type type;  // of floats: bfloat16, float16, float32
};

uint32_t below(Random& random, uint32_t count) { return static_cast<uint32_t>(random() % count); }

std::vector<Shape> some_shapes(Random& random) {
  static constexpr uint32_t kernels[] = {1, 9, 25, 4, 49, 3, 1, 9};
  static constexpr uint32_t states[] = {1, 4, 8, 16, 32, 64};
  std::vector<Shape> shapes(1 + below(random, 3));
  for (Shape& shape : shapes) {
    shape.kernel = kernels[below(random, 8)];
    shape.states = states[below(random, 6)];
    shape.columns = shape.kernel * below(random, below(random, 8) ? 12 : 50);
    shape.rows = below(random, 12);
  }
  return shapes;
}

size_t total(const std::vector<Shape>& shapes) {
  size_t size = 0;
  for (Shape shape : shapes) size += shape.size();
  return size;
}

std::vector<int32_t> some_codes(Random& random, size_t count, Kind kind) {
  std::vector<int32_t> codes(count);
  uint32_t most = 1u << below(random, 9);
  for (int32_t& code : codes) {
    code = static_cast<int32_t>(below(random, most)) - static_cast<int32_t>(most / 2);
    if (below(random, 200)) continue;
    if (kind.coder == Coder::kFloats || kind.type == Type::kInt8) code = -128;
    else code *= kind.type == Type::kInt32 ? 1000003 : 101;
  }
  return codes;
}

template <class Model>
Bytes adaptive(std::vector<int32_t> codes, const std::vector<Shape>& shapes) {
  RangeEncoder range;
  auto model = std::make_unique<Model>();
  code_matrices(range, *model, codes.data(), shapes);
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
  void add(std::vector<int32_t> codes, Shape shape) {
    code_matrices(range_, *model_, codes.data(), {shape});
  }
  void row(const std::vector<int32_t>& codes) {
    add(codes, Shape{1, static_cast<uint32_t>(codes.size())});
  }
  Bytes finish() { return range_.finish(); }

 private:
  RangeEncoder range_;
  std::unique_ptr<Small> model_ = std::make_unique<Small>();
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
  int tables = 1 + static_cast<int>(below(random, 16)), bits = below(random, 2) ? 12 : 14;
  SideWriter side;
  side.row({tables - 1, bits - kLeastTableBits, 63, 1});
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
  side.add(weights, Shape{static_cast<uint32_t>(tables), 64});
  std::vector<uint32_t> frequency(weights.size(), (1u << bits) / 64);
  std::vector<uint8_t> places(codes.size(), 0);
  if (tables > 1) Positions(layouts, tables).fill(places.data(), places.size());
  Bytes out = part(side.finish());
  join(out, part(escapes(escaped)));
  join(out, rans_encode(symbols.data(), places.data(), symbols.size(), frequency.data(),
                        static_cast<uint32_t>(tables), 64, bits));
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

Bytes encode(Random& random, Kind kind, const std::vector<int32_t>& codes,
             const std::vector<Shape>& shapes) {
  switch (kind.coder) {
    case Coder::kSmall: return adaptive<Small>(codes, shapes);
    case Coder::kMax: return adaptive<Mixed>(codes, shapes);
    case Coder::kHuffman: return huffman(codes);
    default: return fast(random, codes, shapes);
  }
}

template <class Model, class Value>
void decode_adaptive(Span data, const std::vector<Shape>& shapes, std::vector<Value>& found) {
  RangeDecoder range(data);
  auto model = std::make_unique<Model>();
  code_matrices(range, *model, found.data(), shapes);
  range.finish();
}

template <class Value>
void decode_as(Coder coder, Span data, const std::vector<Shape>& shapes,
               std::vector<int32_t>& codes) {
  std::vector<Value> found(codes.size());
  switch (coder) {
    case Coder::kSmall: decode_adaptive<Small>(data, shapes, found); break;
    case Coder::kMax: decode_adaptive<Mixed>(data, shapes, found); break;
    case Coder::kFast: fast_decode<Value>(data, shapes, found.data(), found.size()); break;
    default: huffman_decode<Value>(data, found.data(), found.size());
  }
  std::copy(found.begin(), found.end(), codes.begin());
}

// The exponents come back; the rest of each float is zero.
template <class Float>
void decode_floats(Span data, const std::vector<Shape>& shapes, int shift,
                   std::vector<int32_t>& codes) {
  if (codes.empty()) return;
  using Bits = typename Float::Bits;
  std::vector<Bits> found(codes.size());
  std::vector<uint8_t> rest(codes.size() * (sizeof(Bits) - 1));
  floats_decode<Float>(data, shapes, rest.data(), 0, found.data(), found.size());
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<int8_t>(found[i] >> shift);
}

void decode(Kind kind, Span data, const std::vector<Shape>& shapes, std::vector<int32_t>& codes) {
  if (kind.coder == Coder::kFloats) {
    switch (kind.type) {
      case Type::kInt8: return decode_floats<Bfloat16>(data, shapes, 7, codes);
      case Type::kInt16: return decode_floats<Float16>(data, shapes, 8, codes);
      default: return decode_floats<Float32>(data, shapes, 23, codes);
    }
  }
  switch (kind.type) {
    case Type::kInt8: return decode_as<int8_t>(kind.coder, data, shapes, codes);
    case Type::kInt16: return decode_as<int16_t>(kind.coder, data, shapes, codes);
    default: return decode_as<int32_t>(kind.coder, data, shapes, codes);
  }
}

// Whether the bytes were a stream; with one path of the processor.
bool decodes(Kind kind, Span data, const std::vector<Shape>& shapes, std::vector<int32_t>& codes,
             bool vectors) {
  wide() = vectors && has_avx2();
  most_held = held;
  size_t before = held;
  bool found = true;
  try {
    decode(kind, data, shapes, codes);
  } catch (const Malformed&) {
    found = false;
  }
  if (most_held - before > (4u << 20) + 48 * codes.size()) {
    std::printf("%zu bytes for %zu codes\n", most_held - before, codes.size());
    std::abort();
  }
  return found;
}

void mutate(Random& random, Bytes& data) {
  for (uint32_t left = 1 + below(random, 4); left; --left) {
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
  using Clock = std::chrono::steady_clock;
  auto end = Clock::now() + std::chrono::seconds(count > 1 ? std::stoi(arguments[1]) : 60);
  Random random(count > 2 ? std::stoull(arguments[2]) : 0);
  unsigned long long done = 0, refused = 0;
  while (Clock::now() < end) {
    Kind kind{static_cast<Coder>(below(random, 5)), static_cast<Type>(below(random, 3))};
    auto shapes = some_shapes(random);
    auto codes = some_codes(random, total(shapes), kind);
    Bytes whole = encode(random, kind, codes, shapes);
    std::vector<int32_t> back(codes.size()), again(codes.size());
    if (!decodes(kind, {whole.data(), whole.size()}, shapes, back, true) || back != codes) {
      std::printf("coder %d does not give its codes back\n", static_cast<int>(kind.coder));
      return 1;
    }
    for (int i = 0; i < 40; ++i, ++done) {
      Bytes data = whole;
      if (below(random, 20) == 0) {
        for (uint8_t& byte : data) byte = static_cast<uint8_t>(random());
      } else {
        mutate(random, data);
      }
      // An own copy of the exact size, so that reading beyond it is seen.
      std::unique_ptr<uint8_t[]> exact(new uint8_t[data.size()]);
      std::copy(data.begin(), data.end(), exact.get());
      Span span{exact.get(), data.size()};
      bool one = decodes(kind, span, shapes, back, true);
      refused += !one;
      if (i % 4) continue;
      bool two = decodes(kind, span, shapes, again, false);
      if (one != two || (one && back != again)) {
        std::printf("coder %d depends on the processor\n", static_cast<int>(kind.coder));
        return 1;
      }
    }
  }
  std::printf("%llu streams: %llu refused, %llu decoded, none of them out of bounds\n", done,
              refused, done - refused);
  return 0;
}
