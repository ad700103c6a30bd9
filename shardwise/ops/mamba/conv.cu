// Depthwise causal convolution in place, with a state cache of the last K - 1 inputs of every sequence.
//
// A thread owns V neighbouring channels and walks over tokens, so that no other thread reads what it overwrites.
// Prefill works on blocks of tokens in parallel: `save` first copies the K - 1 inputs before each block and updates
// the caches, then `prefill` computes. V = 1 takes any strides; the wide forms move 16 bytes at once.
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

struct Args {
  void* x;
  const void* weight;  // [C, K]
  const void* bias;    // [C] or null
  const void* bounds;  // [sequences + 1]
  const void* slots;
  const bool* resumes;
  void* cache;
  void* halo;  // [blocks, K - 1, C]
  int64_t* word;  // for a report of bad metadata (metadata_reports.py)
  int64_t x_t, x_c, cache_slot, cache_c, cache_k, slot_count, tokens;  // tokens: of prefill
  int32_t channels, sequences, rows, blocks;  // blocks: tokens in decode
  int32_t wide_bounds, wide_slots, silu, groups;  // groups: thread blocks that share a decode step's tokens
  int32_t overlap;  // whether decode may be scheduled while its predecessor drains
};

constexpr int kThreads = 128;
constexpr int kGroup = 4;   // rows of prefill tokens on their way
constexpr int kStages = 2;  // decode tokens on their way; 8 KB of shared memory a block with K = 4
constexpr int kResident = 10;  // blocks of a decode step on a multiprocessor, all of which run at once
constexpr int kStepThreads = 64;  // of such a block; blocks of 128 took 6.75 µs for 6.3 on an H200 (256 tokens)

// Nothing is touched before all earlier kernels are through.
__device__ void await_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may be scheduled as soon as all blocks have said so or ended.
__device__ void admit_successor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ int64_t index_at(const void* data, int wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
}

// A bound of sequence i, which no content of `bounds` leads out of the prefill tokens.
__device__ int64_t bound_at(const Args& a, int64_t i) {
  return max(int64_t(0), min(index_at(a.bounds, a.wide_bounds, i), a.tokens));
}

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

template <typename T, int V>
__device__ Pack<T, V> load(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <typename T, int V>
__device__ void store(T* to, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

__device__ float wide(float x) { return x; }
__device__ float wide(__half x) { return __half2float(x); }
__device__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void narrow(float x, float& to) { to = x; }
__device__ void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

template <typename T, int V>
__device__ Pack<T, V> narrow(const float (&x)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) narrow(x[v], pack.value[v]);
  return pack;
}

// Two values an instruction.
template <>
__device__ Pack<__nv_bfloat16, 8> narrow<__nv_bfloat16, 8>(const float (&x)[8]) {
  Pack<__nv_bfloat16, 8> pack;
#pragma unroll
  for (int v = 0; v < 8; v += 2)
    *reinterpret_cast<__nv_bfloat162*>(pack.value + v) = __floats2bfloat162_rn(x[v], x[v + 1]);
  return pack;
}

template <>
__device__ Pack<__half, 8> narrow<__half, 8>(const float (&x)[8]) {
  Pack<__half, 8> pack;
#pragma unroll
  for (int v = 0; v < 8; v += 2) *reinterpret_cast<__half2*>(pack.value + v) = __floats2half2_rn(x[v], x[v + 1]);
  return pack;
}

template <typename T, int V>
__device__ void widen(const Pack<T, V>& pack, float (&x)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] = wide(pack.value[v]);
}

// Two values of a word, an instruction each; taken out of their pack one by one they cost two.
template <>
__device__ void widen<__nv_bfloat16, 8>(const Pack<__nv_bfloat16, 8>& pack, float (&x)[8]) {
  const auto* words = reinterpret_cast<const unsigned*>(pack.value);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
  }
}

// x / (1 + exp(-x)) in five instructions: the forms that flush denormals need no scaling around them, and the kernels
// are about as busy with this as with memory.
__device__ float activate(float x, int silu) {
  if (!silu) return x;
  float e, quotient;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(1.0f + e));
  return x * quotient;
}

struct Block {
  int64_t start, end, local;  // sequence's first token, its end, tokens of it before this block
  int sequence;               // == sequences: the block is not used
};

// Every sequence begins a new block: a warp scans the block counts of 32 sequences at a time.
__device__ Block find_block(const Args& a, int64_t block) {
  __shared__ Block found;
  if (threadIdx.x < 32) {
    int64_t before = 0;
    int sequence = a.sequences;
    for (int base = 0; base < a.sequences; base += 32) {
      int i = base + threadIdx.x;
      int64_t count = 0;
      if (i < a.sequences) count = max(int64_t(0), bound_at(a, i + 1) - bound_at(a, i) + a.rows - 1) / a.rows;
      int64_t sum = count;
      for (int step = 1; step < 32; step *= 2) {
        int64_t other = __shfl_up_sync(~0u, sum, step);
        if (threadIdx.x >= step) sum += other;
      }
      unsigned beyond = __ballot_sync(~0u, before + sum > block);
      if (beyond) {
        int lane = __ffs(beyond) - 1;
        before += __shfl_sync(~0u, sum - count, lane);
        sequence = base + lane;
        break;
      }
      before += __shfl_sync(~0u, sum, 31);
    }
    if (threadIdx.x == 0) {
      found.sequence = sequence;
      found.local = (block - before) * a.rows;
      found.start = sequence < a.sequences ? bound_at(a, sequence) : 0;
      found.end = sequence < a.sequences ? bound_at(a, sequence + 1) : 0;
    }
  }
  __syncthreads();
  return found;
}

// What metadata_reports.py reads.
__device__ void report(const Args& a, int64_t kind, int64_t sequence, int64_t value) {
  value = max(int64_t(INT32_MIN), min(value, int64_t(INT32_MAX)));
  *a.word = kind << 56 | (sequence & 0xFFFFFF) << 32 | (value & 0xFFFFFFFF);
}

__device__ int64_t live_slot(const Args& a, int64_t sequence) {
  const int64_t slot = index_at(a.slots, a.wide_slots, sequence);
  return slot < a.slot_count ? slot : -1;
}

// The slot that was read for `sequence`, or -1.
__device__ int64_t checked_slot(const Args& a, int64_t slot, int64_t sequence) {
  if (slot >= -1 && slot < a.slot_count) return slot;
  report(a, 1, sequence, slot);
  return -1;
}

// By one thread block of a launch: its threads share the sequences.
__device__ void check_sequences(const Args& a) {
  for (int64_t i = threadIdx.x; i < a.sequences; i += kThreads) {
    const int64_t low = index_at(a.bounds, a.wide_bounds, i), high = index_at(a.bounds, a.wide_bounds, i + 1);
    if (low > high || (i == 0 && low != 0) || (i == a.sequences - 1 && high != a.tokens)) report(a, 2, i, high);
    checked_slot(a, index_at(a.slots, a.wide_slots, i), i);
  }
}

// Neighbouring thread blocks take neighbouring channels, so that rows are read whole at about the same time.
template <int V>
struct Place {
  int64_t block;  // of prefill tokens, or the decode token
  int64_t c;      // the thread's first channel

  __device__ explicit Place(const Args& a) {
    int tiles = (a.channels + kThreads * V - 1) / (kThreads * V);
    block = blockIdx.x / tiles;
    c = (int64_t(blockIdx.x % tiles) * kThreads + threadIdx.x) * V;
  }
};

template <typename T, int K, int V>
__global__ void save(Args a) {
  admit_successor();
  await_predecessor();
  if (blockIdx.x == 0) check_sequences(a);
  const Place<V> place(a);
  const int64_t c = place.c;
  Block b = find_block(a, place.block);
  if (b.sequence >= a.sequences || c >= a.channels) return;
  int64_t slot = live_slot(a, b.sequence);
  if (slot < 0) return;
  T* x = static_cast<T*>(a.x) + c * a.x_c;
  T* cache = static_cast<T*>(a.cache) + slot * a.cache_slot + c * a.cache_c;
  T* halo = static_cast<T*>(a.halo) + place.block * (K - 1) * a.channels + c;
  Pack<T, V> past[K - 1];
  bool resume = a.resumes[b.sequence];
  for (int k = 0; k < K - 1; ++k)
    for (int v = 0; v < V; ++v)
      past[k].value[v] = resume && b.local == 0 ? cache[v * a.cache_c + k * a.cache_k] : T(0.0f);
#pragma unroll
  for (int k = 0; k < K - 1; ++k) {
    int64_t row = b.local + k - (K - 1);
    store<T, V>(halo + k * int64_t(a.channels), row >= 0 ? load<T, V>(x + (b.start + row) * a.x_t) : past[k]);
  }
  if (b.local != 0) return;
  int64_t length = b.end - b.start;
#pragma unroll
  for (int k = 0; k < K - 1; ++k) {
    int64_t row = length + k - (K - 1);
    Pack<T, V> last = past[0];
    if (row >= 0) {
      last = load<T, V>(x + (b.start + row) * a.x_t);
    } else {
#pragma unroll
      for (int j = 0; j < K - 1; ++j)
        if (j == length + k) last = past[j];
    }
    for (int v = 0; v < V; ++v) cache[v * a.cache_c + k * a.cache_k] = last.value[v];
  }
}

template <typename T, int K, int V>
struct Taps {
  float weight[K][V], bias[V];

  __device__ Taps(const Args& a, int64_t c) {
    const T* from = static_cast<const T*>(a.weight) + c * K;  // V channels are K packs in a row
    Pack<T, V> raw[K];
#pragma unroll
    for (int j = 0; j < K; ++j) raw[j] = load<T, V>(from + j * V);
    Pack<T, V> offset{};
    if (a.bias) offset = load<T, V>(static_cast<const T*>(a.bias) + c);
    widen(offset, bias);
#pragma unroll
    for (int j = 0; j < K; ++j) {
      float values[V];
      widen(raw[j], values);
#pragma unroll
      for (int v = 0; v < V; ++v) weight[(j * V + v) % K][(j * V + v) / K] = values[v];
    }
  }

  // The result of one token.
  __device__ Pack<T, V> step(const float (&past)[K - 1][V], const Pack<T, V>& token, int silu) const {
    float x[V], out[V];
    widen(token, x);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float sum = bias[v];
#pragma unroll
      for (int k = 0; k < K - 1; ++k) sum += weight[k][v] * past[k][v];
      out[v] = activate(sum + weight[K - 1][v] * x[v], silu);
    }
    return narrow<T, V>(out);
  }
};

template <typename T, int K, int V>
__global__ void __launch_bounds__(kThreads, 4) prefill(Args a) {
  admit_successor();
  await_predecessor();
  const Place<V> place(a);
  const int64_t c = place.c;
  Block b = find_block(a, place.block);
  if (b.sequence >= a.sequences || c >= a.channels || live_slot(a, b.sequence) < 0) return;
  T* x = static_cast<T*>(a.x) + (b.start + b.local) * a.x_t + c * a.x_c;
  const int count = int(min(int64_t(a.rows), b.end - b.start - b.local));
  Pack<T, V> now[kGroup], next[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (i < count) next[i] = load<T, V>(x + i * a.x_t);
  const T* halo = static_cast<const T*>(a.halo) + place.block * (K - 1) * a.channels + c;
  Pack<T, V> past[K - 1];
#pragma unroll
  for (int k = 0; k < K - 1; ++k) past[k] = load<T, V>(halo + k * int64_t(a.channels));
  const Taps<T, K, V> taps(a, c);
  for (int first = 0; first < count; first += kGroup) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      now[i] = next[i];
      if (first + kGroup + i < count) next[i] = load<T, V>(x + (first + kGroup + i) * a.x_t);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float window[K - 1][V];  // widened once a row: the compiler keeps what the last rows share
#pragma unroll
      for (int k = 0; k < K - 1; ++k) widen(past[k], window[k]);
      const Pack<T, V> out = taps.step(window, now[i], a.silu);
      if (first + i < count) store<T, V>(x + (first + i) * a.x_t, out);
#pragma unroll
      for (int k = 0; k + 1 < K - 1; ++k) past[k] = past[k + 1];
      past[K - 2] = now[i];
    }
  }
}

// One token, any strides.
template <typename T, int K>
__global__ void decode_any(Args a) {
  admit_successor();
  await_predecessor();
  const Place<1> place(a);
  const int64_t c = place.c;
  if (c >= a.channels) return;
  const int64_t slot =
      checked_slot(a, index_at(a.slots, a.wide_slots, place.block), a.sequences + place.block);
  if (slot < 0) return;
  T* x = static_cast<T*>(a.x) + place.block * a.x_t + c * a.x_c;
  T* cache = static_cast<T*>(a.cache) + slot * a.cache_slot + c * a.cache_c;
  T kept[K];
  float past[K - 1][1];
#pragma unroll
  for (int k = 0; k < K - 1; ++k) past[k][0] = wide(kept[k] = cache[k * a.cache_k]);
  const Taps<T, K, 1> taps(a, c);
  const Pack<T, 1> token = load<T, 1>(x);
  kept[K - 1] = token.value[0];
  store<T, 1>(x, taps.step(past, token, a.silu));
#pragma unroll
  for (int k = 0; k < K - 1; ++k) cache[k * a.cache_k] = kept[k + 1];
}

// 16 bytes from global to shared memory, on their way until `await_groups`.
__device__ void copy_ahead(unsigned to, const char* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#else
  const uint4 value = *reinterpret_cast<const uint4*>(from);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
#endif
}

__device__ void close_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int OPEN>
__device__ void await_groups() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory");
#endif
}

// Dense channels and states: a thread block walks over every `groups`-th token of its channels, whose weights it reads
// once, with kStages tokens on their way into shared memory. WHOLE: all lanes of all warps have channels.
//
// The states of a warp's channels are one run of packs. They are moved in order, 512 bytes an instruction, and change
// hands in shared memory: a thread's own states are K - 1 packs in a row. Warps do not wait for each other. The number
// of instructions bounds the step as much as memory does: slots come 32 a load and pass from lane to lane, strides in
// bytes are 32-bit numbers, and the grid has two dimensions, so that nothing is divided.
template <typename T, int K, int V, bool WHOLE>
__global__ void __launch_bounds__(kStepThreads, kResident) decode_wide(Args a) {
  using P = Pack<T, V>;
  constexpr int kRow = 32 * sizeof(P);  // bytes that a warp moves in an instruction
  __shared__ P rooms[kStages][kStepThreads / 32][32 * K];  // of a warp: its states, then its inputs
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = int(blockIdx.y);
  const int64_t c = (int64_t(blockIdx.x) * kStepThreads + threadIdx.x) * V;
  const int64_t first = c - lane * V;  // the warp's first channel
  if (!WHOLE && first >= a.channels) return;
  const bool mine = WHOLE || c < a.channels;
  const int packs = WHOLE ? 32 * (K - 1) : int(min(int64_t(32), (a.channels - first) / V)) * (K - 1);  // that exist
  const unsigned slot_bytes = unsigned(a.cache_slot * sizeof(T));
  const int64_t step = a.groups * a.x_t * int64_t(sizeof(T));  // from token to token
  char* cache = static_cast<char*>(a.cache) + (first * (K - 1) + lane * V) * sizeof(T);
  char* x_in = static_cast<char*>(a.x) + (c + group * a.x_t) * int64_t(sizeof(T));
  char* x_out = x_in;
  const unsigned room = static_cast<unsigned>(__cvta_generic_to_shared(&rooms[0][warp][lane]));

  auto token_at = [&](int n) { return group + int64_t(n) * a.groups; };
  auto slot_at = [&](int64_t token) { return token < a.blocks ? index_at(a.slots, a.wide_slots, token) : -1; };
  auto checked = [&](int64_t slot, int64_t token) { return int(checked_slot(a, slot, a.sequences + token)); };
  await_predecessor();
  // The first slots are asked for before the weights, which come while the states wait for them.
  const int64_t given = slot_at(token_at(lane));
  const Taps<T, K, V> taps(a, mine ? c : 0);
  int slots = checked(given, token_at(lane)), slot[kStages];  // a lane's of 32 tokens, -1 behind the last
  auto fetch = [&](int stage, int n) {
    if (n % 32 == 0 && n > 0) slots = checked(slot_at(token_at(n + lane)), token_at(n + lane));
    slot[stage] = __shfl_sync(~0u, slots, n % 32);
    if (slot[stage] >= 0) {
      const char* from = cache + uint64_t(unsigned(slot[stage])) * slot_bytes;
      const unsigned to = room + stage * unsigned(sizeof(rooms[0]));
#pragma unroll
      for (int j = 0; j < K - 1; ++j)
        if (WHOLE || lane + 32 * j < packs) copy_ahead(to + j * kRow, from + j * kRow);
      if (mine) copy_ahead(to + (K - 1) * kRow, x_in);
    }
    x_in += step;
    close_group();
  };
  auto advance = [&](const Taps<T, K, V>& taps, int stage) {
    P* states = rooms[stage][warp];
    P own[K - 1];
    float flat[K - 1][V], past[K - 1][V];
#pragma unroll
    for (int j = 0; j < K - 1; ++j) widen(own[j] = states[lane * (K - 1) + j], flat[j]);
#pragma unroll
    for (int i = 0; i < V * (K - 1); ++i) past[i % (K - 1)][i / (K - 1)] = flat[i / V][i % V];
    const P input = states[32 * (K - 1) + lane];
    const P out = taps.step(past, input, a.silu);
    if (mine) *reinterpret_cast<P*>(x_out) = out;
    // The kept inputs move by one place, as they are; the new one follows.
    P kept[K - 1];
#pragma unroll
    for (int i = 0; i < V * (K - 1); ++i) {
      const int v = i / (K - 1), k = i % (K - 1);
      kept[i / V].value[i % V] = k < K - 2 ? own[(i + 1) / V].value[(i + 1) % V] : input.value[v];
    }
#pragma unroll
    for (int j = 0; j < K - 1; ++j) states[lane * (K - 1) + j] = kept[j];
    __syncwarp();
    char* to = cache + uint64_t(unsigned(slot[stage])) * slot_bytes;
#pragma unroll
    for (int j = 0; j < K - 1; ++j)
      if (WHOLE || lane + 32 * j < packs) *reinterpret_cast<P*>(to + j * kRow) = states[lane + 32 * j];
  };

#pragma unroll
  for (int s = 0; s < kStages; ++s) fetch(s, s);
  for (int begin = 0; token_at(begin) < a.blocks; begin += kStages) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      await_groups<kStages - 1>();
      __syncwarp();
      if (slot[s] >= 0) advance(taps, s);
      x_out += step;
      __syncwarp();
      fetch(s, begin + s + kStages);
    }
  }
  // Blocks of the next step that came earlier would wait and leave the places of its single wave uneven.
  admit_successor();
}

// Thread blocks that share a token's channels.
template <int V>
unsigned tiles(const Args& a, int threads = kThreads) {
  return (a.channels + threads * V - 1) / (threads * V);
}

void launch(void (*kernel)(Args), const Args& a, dim3 grid, bool overlaps, cudaStream_t stream, int threads = kThreads) {
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = overlaps ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, a);
}

// Prefill's kernels do not overlap: 8192 tokens of 8192 channels took 90 µs instead of 82 on an H200, presumably because
// the blocks of one are a single wave that those of its neighbours place unevenly.
template <typename T, int K>
void run(const Args& a, bool is_decode, bool vector, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  if (is_decode && vector) {
    const bool whole = a.channels % (V * kStepThreads) == 0;
    const dim3 grid(tiles<V>(a, kStepThreads), unsigned(a.groups));
    const auto kernel = whole ? decode_wide<T, K, V, true> : decode_wide<T, K, V, false>;
    launch(kernel, a, grid, a.overlap, stream, kStepThreads);
  } else if (is_decode) {
    launch(decode_any<T, K>, a, tiles<1>(a) * a.blocks, a.overlap, stream);
  } else if (vector) {
    const dim3 grid(tiles<V>(a) * a.blocks);
    launch(save<T, K, V>, a, grid, false, stream);
    launch(prefill<T, K, V>, a, grid, false, stream);
  } else {
    const dim3 grid(tiles<1>(a) * a.blocks);
    launch(save<T, K, 1>, a, grid, false, stream);
    launch(prefill<T, K, 1>, a, grid, false, stream);
  }
}

template <typename T>
bool run_taps(const Args& a, int taps, bool is_decode, bool vector, cudaStream_t stream) {
  switch (taps) {
    case 2: run<T, 2>(a, is_decode, vector, stream); return true;
    case 3: run<T, 3>(a, is_decode, vector, stream); return true;
    case 4: run<T, 4>(a, is_decode, vector, stream); return true;
    default: return false;
  }
}

}  // namespace

// type: 0 float, 1 half, 2 bfloat16. Returns a cudaError_t, or -1 for a type or number of taps without a kernel.
// `args` points to an Args; a parameter of a type without linkage would take the function's own linkage away.
extern "C" int shardwise_causal_conv(const void* args, int type, int taps, int is_decode, int vector, void* stream) {
  const Args& given = *static_cast<const Args*>(args);
  auto queue = static_cast<cudaStream_t>(stream);
  bool known = false;
  if (type == 0) known = run_taps<float>(given, taps, is_decode, vector, queue);
  if (type == 1) known = run_taps<__half>(given, taps, is_decode, vector, queue);
  if (type == 2) known = run_taps<__nv_bfloat16>(given, taps, is_decode, vector, queue);
  return known ? static_cast<int>(cudaGetLastError()) : -1;
}
