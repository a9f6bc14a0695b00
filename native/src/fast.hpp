// Streams of `fast`.
#pragma once

#include <limits>

#include "rans.hpp"

namespace tersor {

// The values that have no symbol of their own.
inline std::vector<int32_t> escaped_values(Span data, size_t count) {
  if (count > 0xffffffffu) throw Malformed("holds too many escapes");
  SideDecoder side(data);
  auto values = side_row(side, static_cast<uint32_t>(count));
  side.finish();
  return values;
}

// Puts them in place of the escapes.
template <class Value>
void put_escaped(Span data, int32_t escape, Value* out, size_t count) {
  std::vector<size_t> places;
  for (size_t i = 0; i < count; ++i) {
    if (out[i] == static_cast<Value>(escape)) places.push_back(i);
  }
  auto values = escaped_values(data, places.size());
  for (size_t i = 0; i < places.size(); ++i) {
    if (values[i] < std::numeric_limits<Value>::min() ||
        values[i] > std::numeric_limits<Value>::max()) {
      throw Malformed("holds a code too large for its type");
    }
    out[places[i]] = static_cast<Value>(values[i]);
  }
}

// A stream of `fast`, all but its words read.
class FastStream {
 public:
  FastStream(Span data, const std::vector<Shape>& shapes) : reader_(data) {
    SideDecoder side(reader_.part());
    auto header = side_row(side, 4);
    int tables = checked(header[0], 0, kMostTables - 1, "holds too many tables") + 1;
    int bits = checked(header[1], 0, kMostTableBits - kLeastTableBits, "has tables too large");
    int symbols = checked(header[2], 0, kMostSymbols - 1, "holds too many symbols") + 1;
    escapes = checked(header[3], 0, 1, "holds an unknown flag");
    escape = signed_value(symbols - 1);
    many_tables_ = tables > 1;
    for (Shape shape : shapes) {
      layouts_.push_back(tables > 1 && shape.size() ? read_layout(side, shape)
                                                    : Layout{shape, 0, {}, {}});
    }
    auto weights = side_weights(side, tables, symbols);
    side.finish();
    escaped = reader_.part();
    if (!escapes && escaped.size) throw Malformed("holds escaped codes without need");
    positions_ = std::make_unique<Positions>(layouts_, tables);
    tables_ = std::make_unique<RansTables>(weights, tables, symbols, bits + kLeastTableBits);
  }

  // As in RansDecoder::decode.
  template <class Value, class Give, class Take>
  void decode(size_t count, Give give, Take take) {
    RansDecoder<Value>(*tables_).decode(reader_.rest(), *positions_, many_tables_, count, give,
                                        take);
  }

  bool escapes;
  int32_t escape;
  Span escaped{};

 private:
  Reader reader_;
  bool many_tables_;
  std::vector<Layout> layouts_;
  std::unique_ptr<Positions> positions_;
  std::unique_ptr<RansTables> tables_;
};

template <class Value>
void fast_decode(Span data, const std::vector<Shape>& shapes, Value* out, size_t count) {
  if (count == 0) {
    if (data.size) throw Malformed("goes on after its last symbol");
    return;
  }
  FastStream stream(data, shapes);
  stream.decode<Value>(count, [&](size_t first) { return out + first; }, [](size_t, size_t) {});
  if (stream.escapes) put_escaped(stream.escaped, stream.escape, out, count);
}

}  // namespace tersor
