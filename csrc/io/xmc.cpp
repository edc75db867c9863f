// Text of the Extreme Classification Repository, a row a line ("label,label feature:value feature:value ..."), to
// rows in compressed sparse form.
//
// Two passes over the lines, both parallel: the first counts each line's labels and features by their separators, so
// that the second writes every line straight to its place. The counts hold for each line that the second pass
// accepts, and it never writes more than was counted: a label ends at a comma or is the last, a feature has a colon.
#include <algorithm>
#include <charconv>
#include <climits>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>

#include "../common/tensors.h"

#if !defined(__cpp_lib_to_chars)  // libc++ (macOS): its from_chars takes no float
#include <locale.h>
#include <stdlib.h>
#if defined(__APPLE__)
#include <xlocale.h>
#endif
#endif

namespace slide_torch {
namespace {

constexpr const char* kOp = "parse_xmc";

struct Line {
  const char* begin;
  const char* end;
};

// What is wrong with a line; becomes the operator's error together with the line's number.
struct LineError {
  std::string message;
};

inline bool is_blank(char c) {
  return c == ' ' || c == '\t';
}
inline bool is_digit(char c) {
  return static_cast<unsigned char>(c - '0') < 10;
}

const char* skip_blanks(const char* p, const char* end) {
  while (p < end && is_blank(*p)) ++p;
  return p;
}

const char* skip_token(const char* p, const char* end) {
  while (p < end && !is_blank(*p)) ++p;
  return p;
}

// The text in quotes, cut and with only printable ASCII: it becomes part of a Python string.
std::string quoted(const char* begin, const char* end) {
  constexpr int64_t longest = 40;
  const bool cut = end - begin > longest;
  std::string text(begin, cut ? begin + longest : end);
  for (char& c : text)
    if (c < 0x20 || c > 0x7e) c = '?';
  return "'" + text + (cut ? "...'" : "'");
}

std::vector<Line> split_lines(const char* text, int64_t size) {
  std::vector<Line> lines;
  const char* const end = text + size;
  for (const char* begin = text; begin < end;) {
    const void* newline = std::memchr(begin, '\n', end - begin);
    const char* const stop = newline ? static_cast<const char*>(newline) : end;
    lines.push_back({begin, stop > begin && stop[-1] == '\r' ? stop - 1 : stop});
    begin = newline ? stop + 1 : end;
  }
  return lines;
}

// Labels are the first token, unless the line starts with a blank or with a feature: then there are none.
const char* end_of_labels(const Line& line) {
  const char* const end = skip_token(line.begin, line.end);
  return std::find(line.begin, end, ':') == end ? end : line.begin;
}

// Reads digits up to anything else. Returns where it stopped, or null unless they make an integer in [0, limit).
const char* read_index(const char* p, const char* end, int64_t limit, int32_t& index) {
  const char* const begin = p;
  int64_t number = 0;
  for (; p < end && is_digit(*p); ++p) number = number < limit ? number * 10 + (*p - '0') : limit;
  index = static_cast<int32_t>(number);
  return p > begin && number < limit ? p : nullptr;
}

// The float nearest to the unsigned decimal number in [begin, end), infinity for too large a one. `large`: above 1.
float nearest_float(const char* begin, const char* end, [[maybe_unused]] bool large) {
#if defined(__cpp_lib_to_chars)
  float value = 0;
  const bool outside = std::from_chars(begin, end, value).ec == std::errc::result_out_of_range;
  return !outside ? value : large ? std::numeric_limits<float>::infinity() : 0;
#else
  static const locale_t plain = newlocale(LC_ALL_MASK, "C", nullptr);  // in others the point may be a comma
  return strtof_l(std::string(begin, end).c_str(), nullptr, plain);
#endif
}

// Reads a decimal number, rounded to the nearest float; too small a number becomes zero. Returns where it stopped, or
// null if there is no number or it is not finite as a float.
const char* read_value(const char* p, const char* end, float& value) {
  constexpr uint64_t full = 100'000'000'000'000'000;  // one more digit still fits
  constexpr int64_t endless = 1'000'000'000'000;      // longer than any text
  bool negative = false;
  if (p < end && (*p == '-' || *p == '+')) negative = *p++ == '-';
  const char* const begin = p;
  uint64_t mantissa = 0;
  int64_t exponent = 0, digits = 0;
  for (; p < end && is_digit(*p); ++p, ++digits) {
    if (mantissa < full)
      mantissa = mantissa * 10 + (*p - '0');
    else
      ++exponent;
  }
  if (p < end && *p == '.') {
    for (++p; p < end && is_digit(*p); ++p, ++digits) {
      if (mantissa >= full) continue;
      mantissa = mantissa * 10 + (*p - '0');
      --exponent;
    }
  }
  if (digits == 0) return nullptr;
  if (p < end && (*p == 'e' || *p == 'E')) {
    ++p;
    bool below_one = false;
    if (p < end && (*p == '-' || *p == '+')) below_one = *p++ == '-';
    if (p == end || !is_digit(*p)) return nullptr;
    int64_t power = 0;
    for (; p < end && is_digit(*p); ++p) power = power < endless ? power * 10 + (*p - '0') : power;
    exponent += below_one ? -power : power;
  }
  // Both operands are exact floats, so that one operation rounds once: the usual six decimals never need more.
  static constexpr float powers[] = {1e0f, 1e1f, 1e2f, 1e3f, 1e4f, 1e5f, 1e6f, 1e7f, 1e8f, 1e9f, 1e10f};
  if (mantissa <= (uint64_t{1} << 24) && exponent >= -10 && exponent <= 10) {
    const float whole = static_cast<float>(mantissa);
    value = exponent < 0 ? whole / powers[-exponent] : whole * powers[exponent];
  } else {
    // The mantissa has at most 18 digits, so the exponent alone tells too large numbers from too small ones.
    value = nearest_float(begin, p, exponent > 0);
  }
  if (negative) value = -value;
  return std::isfinite(value) ? p : nullptr;
}

[[noreturn]] void fail_index(const char* kind, int64_t limit, const char* begin, const char* end) {
  throw LineError{std::string(kind) + " index must be an integer in [0, " + std::to_string(limit) + "), got " +
                  quoted(begin, end) + " (indices count from 0)"};
}

// Says what is wrong with a token that is no feature:value.
[[noreturn]] void fail_feature(const char* begin, const char* end, int64_t num_features) {
  const char* const colon = std::find(begin, end, ':');
  if (colon == end) throw LineError{"expected feature:value, got " + quoted(begin, end) + " without a colon"};
  int32_t index;
  if (read_index(begin, colon, num_features, index) != colon) fail_index("feature", num_features, begin, colon);
  throw LineError{"feature value must be a finite float32 number, got " + quoted(colon + 1, end)};
}

void parse_labels(const char* begin, const char* end, int64_t num_labels, int32_t* labels) {
  if (begin == end) return;
  for (const char* p = begin;; ++labels) {
    const char* const comma = std::find(p, end, ',');
    if (read_index(p, comma, num_labels, *labels) != comma) fail_index("label", num_labels, p, comma);
    if (comma == end) return;
    p = comma + 1;
  }
}

void parse_features(const char* begin, const char* end, int64_t num_features, int32_t* indices, float* values) {
  for (const char* p = skip_blanks(begin, end); p < end; p = skip_blanks(p, end)) {
    const char* const token = p;
    int32_t index;
    float value;
    p = read_index(p, end, num_features, index);
    if (p && p < end && *p == ':') {
      p = read_value(p + 1, end, value);
      if (p && (p == end || is_blank(*p))) [[likely]] {
        *indices++ = index;
        *values++ = value;
        continue;
      }
    }
    fail_feature(token, skip_token(token, end), num_features);
  }
}

// Runs parse(i) for all lines; throws for the first line at fault, whatever the number of threads.
template <class Parse>
void for_lines(int64_t count, int64_t bytes, int64_t first_line, const Parse& parse) {
  std::mutex mutex;
  int64_t fault = count;
  std::string message;
  parallel_for(0, count, grain(count ? bytes / count : 0), [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    try {
      for (; i < end; ++i) parse(i);
    } catch (const LineError& error) {
      const std::lock_guard lock(mutex);
      if (i < fault) {
        fault = i;
        message = error.message;
      }
    }
  });
  check(fault == count, kOp, "line ", first_line + fault, ": ", message);
}

}  // namespace

// The first line of `text` has the number `first_line` in errors.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> parse_xmc(Tensor text, int64_t num_features, int64_t num_labels,
                                                             int64_t first_line) {
  check_tensor(kOp, "text", text, ScalarType::Byte, {-1});
  const int64_t size = text.numel();
  check(size <= INT32_MAX, kOp, "text: expected at most 2^31 - 1 bytes, got ", size, "; parse it in chunks");
  for (const auto& [name, limit] : {std::pair{"num_features", num_features}, std::pair{"num_labels", num_labels}})
    check(limit >= 0 && limit <= int64_t{1} << 31, kOp, name, ": expected 0 to 2^31, got ", limit);

  const std::vector<Line> lines = split_lines(reinterpret_cast<const char*>(data<uint8_t>(text)), size);
  const int64_t rows = static_cast<int64_t>(lines.size());
  Tensor label_indptr = empty({rows + 1}, ScalarType::Int), feature_indptr = empty({rows + 1}, ScalarType::Int);
  int32_t* const label_starts = mutable_data<int32_t>(label_indptr);
  int32_t* const feature_starts = mutable_data<int32_t>(feature_indptr);
  label_starts[0] = feature_starts[0] = 0;
  for_lines(rows, size, first_line, [&](int64_t i) {
    const Line& line = lines[i];
    const char* const middle = end_of_labels(line);
    label_starts[i + 1] = middle > line.begin ? static_cast<int32_t>(std::count(line.begin, middle, ',') + 1) : 0;
    feature_starts[i + 1] = static_cast<int32_t>(std::count(middle, line.end, ':'));
  });
  for (int64_t i = 0; i < rows; ++i) {
    label_starts[i + 1] += label_starts[i];
    feature_starts[i + 1] += feature_starts[i];
  }

  Tensor label_indices = empty({label_starts[rows]}, ScalarType::Int);
  Tensor feature_indices = empty({feature_starts[rows]}, ScalarType::Int);
  Tensor feature_values = empty({feature_starts[rows]}, ScalarType::Float);
  int32_t* const labels = mutable_data<int32_t>(label_indices);
  int32_t* const indices = mutable_data<int32_t>(feature_indices);
  float* const values = mutable_data<float>(feature_values);
  for_lines(rows, size, first_line, [&](int64_t i) {
    const Line& line = lines[i];
    const char* const middle = end_of_labels(line);
    parse_labels(line.begin, middle, num_labels, labels + label_starts[i]);
    parse_features(middle, line.end, num_features, indices + feature_starts[i], values + feature_starts[i]);
  });
  return {feature_indptr, feature_indices, feature_values, label_indptr, label_indices};
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("parse_xmc", TORCH_BOX(&parse_xmc));
}

}  // namespace slide_torch
