// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/floats.h"

namespace kernels {

// Order of the names in binding.py.
enum class Direction { forward, reverse, adaptive };

constexpr int64_t ignored_label = -100;

// A head set is the shortest prefix of the teacher's sorted probabilities with half of the mass, up to rounding.
constexpr double half_mass = 0.5 * (1 - 1.0 / (1 << 20));

// One chunk: `rows` rows of `vocabulary` numbers, student contiguous.
struct KlRows {
  void* student;
  Float type;
  const void* teacher;
  Float teacher_type;  // like `type`, or float32
  int64_t teacher_stride, rows, vocabulary;
  const bool* mask;       // rows that count for the divergence; null: all
  const int64_t* labels;  // of rows that count for the cross entropy, else ignored_label; null: none
  const void* scales;     // Wide<type>[2]: weights of one row's divergence and cross entropy in the loss
  void* kl;               // Wide<type>[rows]
  void* ce;               // Wide<type>[rows]
  double temperature;
  Direction direction;
  bool gradient;
};

// kl = temperature^2 times the divergence between softmax(teacher / temperature) and softmax(student / temperature), and
// ce = logsumexp(student) - student[label]; 0 for rows that do not count. With `gradient` the student's row becomes the gradient of
// scales[0] kl + scales[1] ce. A label outside the vocabulary gives NaN.
void kl_gradient(const KlRows& in, void* stream);

// sums[row] = logsumexp(logits[row]), of contiguous rows; sums hold Wide<type>.
void log_sums(const void* logits, Float type, void* sums, int64_t rows, int64_t vocabulary, void* stream);

// logits[row] = factors[row] * exp(logits[row] - sums[row]), where a sum of -infinity gives 0.
void scale_softmax(void* logits, Float type, const void* sums, const void* factors, int64_t rows, int64_t vocabulary, void* stream);

}  // namespace kernels
