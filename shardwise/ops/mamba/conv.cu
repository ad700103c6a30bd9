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
  int64_t x_t, x_c, cache_slot, cache_c, cache_k, slot_count, tokens;  // tokens: of prefill
  int32_t channels, sequences, rows, blocks;  // blocks: tokens in decode
  int32_t wide_bounds, wide_slots, silu, together;  // together: tokens of a decode thread, 1, 2 or 4
};

constexpr int kThreads = 128;
constexpr int kGroup = 4;

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

// The fast division has no slow path for numbers that the quotient of a large batch always holds somewhere.
__device__ float activate(float x, int silu) { return silu ? __fdividef(x, 1.0f + __expf(-x)) : x; }

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

__device__ int64_t live_slot(const Args& a, int64_t sequence) {
  int64_t slot = index_at(a.slots, a.wide_slots, sequence);
  return slot < a.slot_count ? slot : -1;
}

// Neighbouring thread blocks take neighbouring channels, so that rows are read whole at about the same time.
template <int V>
struct Place {
  int64_t block;  // of prefill tokens, or the group of decode tokens
  int64_t c;      // the thread's first channel

  __device__ explicit Place(const Args& a) {
    int tiles = (a.channels + kThreads * V - 1) / (kThreads * V);
    block = blockIdx.x / tiles;
    c = (int64_t(blockIdx.x % tiles) * kThreads + threadIdx.x) * V;
  }
};

template <typename T, int K, int V>
__global__ void save(Args a) {
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
#pragma unroll
    for (int i = 0; i < V * K; ++i) weight[i % K][i / K] = wide(raw[i / V].value[i % V]);
    Pack<T, V> offset{};
    if (a.bias) offset = load<T, V>(static_cast<const T*>(a.bias) + c);
#pragma unroll
    for (int v = 0; v < V; ++v) bias[v] = a.bias ? wide(offset.value[v]) : 0.0f;
  }

  // The result of one token; `past` then ends with that token.
  __device__ Pack<T, V> step(Pack<T, V> (&past)[K - 1], const Pack<T, V>& x, int silu) const {
    Pack<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float sum = bias[v] + weight[K - 1][v] * wide(x.value[v]);
#pragma unroll
      for (int k = 0; k < K - 1; ++k) sum += weight[k][v] * wide(past[k].value[v]);
      narrow(activate(sum, silu), out.value[v]);
    }
#pragma unroll
    for (int k = 0; k + 1 < K - 1; ++k) past[k] = past[k + 1];
    past[K - 2] = x;
    return out;
  }
};

template <typename T, int K, int V>
__global__ void __launch_bounds__(kThreads, 4) prefill(Args a) {
  const Place<V> place(a);
  const int64_t c = place.c;
  Block b = find_block(a, place.block);
  if (b.sequence >= a.sequences || c >= a.channels || live_slot(a, b.sequence) < 0) return;
  const Taps<T, K, V> taps(a, c);
  const T* halo = static_cast<const T*>(a.halo) + place.block * (K - 1) * a.channels + c;
  Pack<T, V> past[K - 1];
#pragma unroll
  for (int k = 0; k < K - 1; ++k) past[k] = load<T, V>(halo + k * int64_t(a.channels));
  T* x = static_cast<T*>(a.x) + (b.start + b.local) * a.x_t + c * a.x_c;
  int count = int(min(int64_t(a.rows), b.end - b.start - b.local));
  Pack<T, V> now[kGroup], next[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (i < count) next[i] = load<T, V>(x + i * a.x_t);
  for (int first = 0; first < count; first += kGroup) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      now[i] = next[i];
      if (first + kGroup + i < count) next[i] = load<T, V>(x + (first + kGroup + i) * a.x_t);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (first + i < count) store<T, V>(x + (first + i) * a.x_t, taps.step(past, now[i], a.silu));
  }
}

// One token, any strides.
template <typename T, int K>
__global__ void decode_any(Args a) {
  const Place<1> place(a);
  const int64_t c = place.c;
  if (c >= a.channels) return;
  const int64_t slot = live_slot(a, place.block);
  if (slot < 0) return;
  T* x = static_cast<T*>(a.x) + place.block * a.x_t + c * a.x_c;
  T* cache = static_cast<T*>(a.cache) + slot * a.cache_slot + c * a.cache_c;
  Pack<T, 1> past[K - 1];
#pragma unroll
  for (int k = 0; k < K - 1; ++k) past[k].value[0] = cache[k * a.cache_k];
  const Taps<T, K, 1> taps(a, c);
  store<T, 1>(x, taps.step(past, load<T, 1>(x), a.silu));
#pragma unroll
  for (int k = 0; k < K - 1; ++k) cache[k * a.cache_k] = past[k].value[0];
}

// The states of a warp's channels are one run of packs. They are moved in order, 512 bytes an instruction, and change
// hands in shared memory: a thread's own states are K - 1 packs in a row.
template <typename T, int K, int V>
struct States {
  Pack<T, V>* room;  // the warp's [32 * (K - 1)] packs of shared memory
  int lane, count;   // packs of this warp that exist

  __device__ void fetch(const Pack<T, V>* from, Pack<T, V> (&moved)[K - 1]) const {
#pragma unroll
    for (int j = 0; j < K - 1; ++j)
      if (lane + 32 * j < count) moved[j] = from[lane + 32 * j];
  }

  __device__ void to_taps(const Pack<T, V> (&moved)[K - 1], Pack<T, V> (&past)[K - 1]) const {
    Pack<T, V> own[K - 1];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < K - 1; ++j) room[lane + 32 * j] = moved[j];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < K - 1; ++j) own[j] = room[lane * (K - 1) + j];
#pragma unroll
    for (int i = 0; i < V * (K - 1); ++i) past[i % (K - 1)].value[i / (K - 1)] = own[i / V].value[i % V];
  }

  __device__ void put(const Pack<T, V> (&past)[K - 1], Pack<T, V>* to) const {
    Pack<T, V> own[K - 1];
#pragma unroll
    for (int i = 0; i < V * (K - 1); ++i) own[i / V].value[i % V] = past[i % (K - 1)].value[i / (K - 1)];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < K - 1; ++j) room[lane * (K - 1) + j] = own[j];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < K - 1; ++j)
      if (lane + 32 * j < count) to[lane + 32 * j] = room[lane + 32 * j];
  }
};

// TOKENS tokens that share one reading of the weights; dense channels and states. The loads of a token are on their way
// while its predecessor is computed.
template <typename T, int K, int V, int TOKENS>
__global__ void __launch_bounds__(kThreads, 4) decode_wide(Args a) {
  __shared__ Pack<T, V> room[kThreads * (K - 1)];
  const Place<V> place(a);
  const int64_t c = place.c;
  const int lane = threadIdx.x % 32;
  const int64_t first = c - lane * V;  // the warp's first channel
  if (first >= a.channels) return;
  const bool mine = c < a.channels;
  const int count = int(min(int64_t(32), (a.channels - first) / V)) * (K - 1);
  const States<T, K, V> states{room + (threadIdx.x - lane) * (K - 1), lane, count};
  T* x = static_cast<T*>(a.x) + place.block * TOKENS * a.x_t + c;
  T* cache = static_cast<T*>(a.cache) + first * (K - 1);
  int64_t slot[TOKENS];
#pragma unroll
  for (int i = 0; i < TOKENS; ++i) {
    const int64_t token = place.block * TOKENS + i;
    slot[i] = token < a.blocks ? live_slot(a, token) : -1;
  }
  Pack<T, V> input[2], moved[2][K - 1];
  auto fetch = [&](int i) {
    if (slot[i] < 0) return;
    if (mine) input[i % 2] = load<T, V>(x + i * a.x_t);
    states.fetch(reinterpret_cast<const Pack<T, V>*>(cache + slot[i] * a.cache_slot), moved[i % 2]);
  };
  fetch(0);
  const Taps<T, K, V> taps(a, mine ? c : 0);
#pragma unroll
  for (int i = 0; i < TOKENS; ++i) {
    if (i + 1 < TOKENS) fetch(i + 1);
    if (slot[i] < 0) continue;
    Pack<T, V> past[K - 1];
    states.to_taps(moved[i % 2], past);
    Pack<T, V> out = taps.step(past, input[i % 2], a.silu);
    if (mine) store<T, V>(x + i * a.x_t, out);
    states.put(past, reinterpret_cast<Pack<T, V>*>(cache + slot[i] * a.cache_slot));
  }
}

template <int V>
unsigned grid(const Args& a, int64_t blocks) {
  return unsigned(blocks * ((a.channels + kThreads * V - 1) / (kThreads * V)));
}

template <typename T, int K, int V, int TOKENS>
void run_wide(const Args& a, cudaStream_t stream) {
  decode_wide<T, K, V, TOKENS><<<grid<V>(a, (a.blocks + TOKENS - 1) / TOKENS), kThreads, 0, stream>>>(a);
}

template <typename T, int K>
void run(const Args& a, bool is_decode, bool vector, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  if (is_decode && !vector) {
    decode_any<T, K><<<grid<1>(a, a.blocks), kThreads, 0, stream>>>(a);
  } else if (is_decode) {
    if (a.together == 4) run_wide<T, K, V, 4>(a, stream);
    if (a.together == 2) run_wide<T, K, V, 2>(a, stream);
    if (a.together == 1) run_wide<T, K, V, 1>(a, stream);
  } else if (vector) {
    save<T, K, V><<<grid<V>(a, a.blocks), kThreads, 0, stream>>>(a);
    prefill<T, K, V><<<grid<V>(a, a.blocks), kThreads, 0, stream>>>(a);
  } else {
    save<T, K, 1><<<grid<1>(a, a.blocks), kThreads, 0, stream>>>(a);
    prefill<T, K, 1><<<grid<1>(a, a.blocks), kThreads, 0, stream>>>(a);
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
