// What the twins of recurrences share; included by them, so once per instruction set (cpu_levels.h). N head size; key numbers the
// columns of a state, value its rows.

// exp(x) - 1 for -0.61 <= x <= 0, relative error below 2e-7: Taylor's series of degree 9.
inline floats exponential_minus_one(floats x) {
  floats series = splat(1.0f / 362880);
  series = series * x + 1.0f / 40320;
  series = series * x + 1.0f / 5040;
  series = series * x + 1.0f / 720;
  series = series * x + 1.0f / 120;
  series = series * x + 1.0f / 24;
  series = series * x + 1.0f / 6;
  series = series * x + 0.5f;
  series = series * x + 1.0f;
  return series * x;
}

template <class Visit>
inline void each_vector(int64_t size, Visit visit) {
  for (int64_t i = 0; i < size; i += lanes) visit(i);
}

inline void widen_row(float* to, const void* from, Float type, int64_t offset, int64_t size) {
  if (type == Float::float32)
    each_vector(size, [&](int64_t i) { store(to + i, load(static_cast<const float*>(from) + offset + i)); });
  else
    each_vector(size, [&](int64_t i) { store(to + i, load(static_cast<const bfloat16*>(from) + offset + i)); });
}

inline void narrow_row(void* to, const float* from, Float type, int64_t offset, int64_t size) {
  if (type == Float::float32)
    each_vector(size, [&](int64_t i) { store(static_cast<float*>(to) + offset + i, load(from + i)); });
  else
    each_vector(size, [&](int64_t i) { store(static_cast<bfloat16*>(to) + offset + i, load(from + i)); });
}

// Asks for rows that are read soon. Those of one head lie kilobytes apart, which no processor foresees.
inline void fetch_rows(std::initializer_list<const void*> tensors, Float type, int64_t offset, int64_t size) {
  const int64_t bytes = type == Float::float32 ? 4 : 2;
  for (const void* tensor : tensors)
    for (int64_t i = 0; i < size * bytes; i += 64) __builtin_prefetch(static_cast<const char*>(tensor) + offset * bytes + i);
}

inline void zero_row(void* to, Float type, int64_t offset, int64_t size) {
  const int64_t bytes = type == Float::float32 ? 4 : 2;
  memset(static_cast<char*>(to) + offset * bytes, 0, size_t(size * bytes));
}

// The tokens that count, of one sequence.
inline std::vector<int64_t> counted(const Sequences& sequences, int64_t sequence) {
  std::vector<int64_t> found;
  for (int64_t token = sequences.begin(sequence); token < sequences.end(sequence); ++token)
    if (sequences.counts(token)) found.push_back(token);
  return found;
}

// Results of tokens that do not count.
inline void zero_others(const Sequences& sequences, int64_t sequence, int64_t head, int64_t size, Float type,
                        std::initializer_list<void*> results) {
  if (!sequences.mask) return;
  for (int64_t token = sequences.begin(sequence); token < sequences.end(sequence); ++token)
    if (!sequences.counts(token))
      for (void* result : results) zero_row(result, type, (token * sequences.heads + head) * size, size);
}

// The tokens of one head of one sequence that count, and where it lies.
template <int N>
struct HeadTokens {
  std::vector<int64_t> tokens;
  int64_t head, heads, count, states;

  HeadTokens(const Sequences& sequences, int64_t sequence, int64_t head)
      : tokens(counted(sequences, sequence)),
        head(head),
        heads(sequences.heads),
        count(int64_t(tokens.size())),
        states((sequence * heads + head) * N * N) {}
  int64_t place(int64_t i) const { return (tokens[size_t(i)] * heads + head) * N; }
};

// States kept from `chunk` on, which nobody needs but somebody might read.
inline void zero_states(float* kept, const Sequences& sequences, int64_t sequence, int64_t head, int64_t chunk, int64_t size) {
  const int64_t last = sequences.end(sequence) / chunk_tokens + sequence;
  for (; chunk <= last; ++chunk) zero_row(kept, Float::float32, (chunk * sequences.heads + head) * size * size, size * size);
}

inline void copy_or_zero(float* to, const float* from, int64_t count) {
  if (from)
    memcpy(to, from, sizeof(float) * size_t(count));
  else
    memset(to, 0, sizeof(float) * size_t(count));
}

// Logits become decays less one, and, where they are wanted, their derivatives.
template <class Decay>
inline void replace_by_decays(float* logits, float* slopes, int64_t size) {
  each_vector(size, [&](int64_t i) {
    const Decay decay(load(logits + i));
    store(logits + i, decay.less_one);
    if (slopes) store(slopes + i, decay.slope);
  });
}

// Values whose state is updated together: 4 (with 32 registers) or 2 vectors, so that all that a token adds up stays in registers.
constexpr int update_vectors = KERNELS_VECTOR_BYTES == 64 ? 4 : 2;

// Rows of a state that backward takes together: their gradient fills half of the registers.
template <int N>
constexpr int backward_rows = std::max<int>(1, (KERNELS_VECTOR_BYTES == 64 ? 16 : 8) / (N / int(lanes)));

// A state by keys: [part of the values][key][width].
template <int N>
struct StateByKeys {
  static constexpr int width = std::min<int>(N, update_vectors* int(lanes)), parts = N / width;
  alignas(64) float parts_of[parts][N][width];
  alignas(64) float whole[N * N];

  // From and to one by values, [value][key].
  void set(const float* from) {
    transpose(whole, from, N);
    for (int part = 0; part < parts; ++part)
      for (int key = 0; key < N; ++key) memcpy(parts_of[part][key], whole + key * N + part * width, sizeof parts_of[part][key]);
  }
  void get(float* to) {
    for (int part = 0; part < parts; ++part)
      for (int key = 0; key < N; ++key) memcpy(whole + key * N + part * width, parts_of[part][key], sizeof parts_of[part][key]);
    transpose(to, whole, N);
  }
};
