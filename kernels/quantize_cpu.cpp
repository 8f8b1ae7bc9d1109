// Quantisation on a CPU: the steps of quantize_reference.py with the same bits, a block at a time in the first
// cache. A tensor is read once and written once, and a compiler finds the vectors in plain loops.
//
// Compile with -ffp-contract=off: a step is rounded by itself. Products c·s are exact, and sums of a rotation
// are those of pairs 1, 2, 4, … apart, in this order, so bits do not depend on the machine.
//
// Every function takes the blocks [begin, end) of all rows, so that threads can share them. Layout: payload.py.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int MOST = 512;  // elements of a block
enum Type : int { NONE, FP32, BF16, INT8 };  // INT8: a payload

int32_t bits(float x) {
    int32_t b;
    std::memcpy(&b, &x, sizeof b);
    return b;
}

float real(int32_t b) {
    float x;
    std::memcpy(&x, &b, sizeof x);
    return x;
}

float from_bf16(uint16_t b) { return real(int32_t(uint32_t(b) << 16)); }

uint16_t to_bf16(float x) {
    const uint32_t b = uint32_t(bits(x));
    const uint32_t nearest = (b + 0x7FFF + ((b >> 16) & 1)) >> 16;  // ties to even
    return uint16_t((b & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : nearest);
}

void load(float* v, const float* x, int count) { std::memcpy(v, x, count * sizeof(float)); }

void load(float* v, const uint16_t* x, int count) {
    for (int i = 0; i < count; ++i) v[i] = from_bf16(x[i]);
}

void load(float* v, const void* x, int type, int64_t at, int count) {
    if (type == FP32) load(v, static_cast<const float*>(x) + at, count);
    if (type == BF16) load(v, static_cast<const uint16_t*>(x) + at, count);
}

void store(void* x, int type, int64_t at, const float* v, int count) {
    if (type == FP32) std::memcpy(static_cast<float*>(x) + at, v, count * sizeof(float));
    if (type == BF16) {
        uint16_t* __restrict out = static_cast<uint16_t*>(x) + at;
        for (int i = 0; i < count; ++i) out[i] = to_bf16(v[i]);
    }
}

// Of a rotation sixteen elements are a vector: partners are 1, 2, 4 and 8 lanes apart, then whole vectors.
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Order __attribute__((vector_size(64)));
constexpr int WIDTH = 16;

template <int APART>
Lanes pairs(Lanes x) {  // a + b in the lanes of a, a - b in those of b
    Order partner, sign;
    for (int i = 0; i < WIDTH; ++i) {
        partner[i] = i ^ APART;
        sign[i] = i & APART ? INT32_MIN : 0;
    }
    return __builtin_shuffle(x, partner) + (Lanes)((Order)x ^ sign);
}

template <int ORDER>
void rotate(float* v, int count, float norm) {
    constexpr int VECTORS = ORDER / WIDTH;
    for (float* group = v; group < v + count; group += ORDER) {
        Lanes x[VECTORS];
        std::memcpy(x, group, sizeof x);
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; ++i) x[i] = pairs<8>(pairs<4>(pairs<2>(pairs<1>(x[i]))));
#pragma GCC unroll 3
        for (int apart = 1; apart < VECTORS; apart *= 2)
#pragma GCC unroll 8
            for (int i = 0; i < VECTORS; ++i)
                if (!(i & apart)) {
                    const Lanes a = x[i], b = x[i + apart];
                    x[i] = a + b;
                    x[i + apart] = a - b;
                }
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; ++i) x[i] *= norm;
        std::memcpy(group, x, sizeof x);
    }
}

void rotate(float* v, int count, int order) {  // norms are 1/sqrt(order)
    if (order == 32) rotate<32>(v, count, 0.17677669529663687f);
    if (order == 64) rotate<64>(v, count, 0.125f);
    if (order == 128) rotate<128>(v, count, 0.08838834764831845f);
}

// The blocks of a payload.
struct Payload {
    uint8_t* codes;
    uint16_t* scales;
    int64_t blocks;
    int block, largest;  // the largest code: 7, 127 or, of e4m3, 448

    Payload(const uint8_t* p, int64_t blocks, int block, int largest)
        : codes(const_cast<uint8_t*>(p)), blocks(blocks), block(block), largest(largest) {
        scales = reinterpret_cast<uint16_t*>(codes + blocks * bytes());
    }
    int bytes() const { return largest == 7 ? block / 2 : block; }
    uint8_t* at(int64_t i) const { return codes + i * bytes(); }
    // Behind the last scale zeros up to a multiple of 16 bytes.
    void pad() const { std::fill(scales + blocks, scales + (blocks + 7) / 8 * 8, 0); }
};

float e4m3(uint8_t code) { return real(int32_t(uint32_t(code & 0x7F) << 20)) * 0x1p120f * (code & 0x80 ? -1 : 1); }

uint8_t to_e4m3(float t) {  // at most 448, by its scale, but for a rounding
    uint32_t b = uint32_t(bits(t * 0x1p-120f)) & 0x7FFFFFFF;
    b = (b + 0x7FFFF + ((b >> 20) & 1)) >> 20;
    return uint8_t(b | (uint32_t(bits(t)) >> 24 & 0x80));
}

int32_t whole(float t) { return bits(t + 12582912.0f) - 0x4B400000; }  // 1.5·2^23: the sum is rounded to even

// c·s of a block, each given to `use(i, c·s)`.
template <class Use>
void each(Payload p, int64_t i_block, Use use) {
    const uint8_t* c = p.at(i_block);
    const float s = from_bf16(p.scales[i_block]);
    const int block = p.block, half = block / 2;
    if (p.largest == 7) {
        for (int i = 0; i < half; ++i) use(i, float((c[i] & 15) - 8) * s);
        for (int i = 0; i < half; ++i) use(i + half, float((c[i] >> 4) - 8) * s);
    } else if (p.largest == 127) {
        for (int i = 0; i < block; ++i) use(i, float(int8_t(c[i])) * s);
    } else {
        for (int i = 0; i < block; ++i) use(i, e4m3(c[i]) * s);
    }
}

// Write codes and the scale of v; true where the scale is NaN, and codes those of zeros.
bool quantise(Payload p, int64_t i_block, const float* __restrict v) {
    const int block = p.block, half = block / 2;
    int32_t amax = 0;  // bits without their sign are in the order of the magnitudes, NaN last
    for (int i = 0; i < block; ++i) amax = std::max(amax, bits(v[i]) & 0x7FFFFFFF);
    const bool poisoned = amax >= 0x7F000000;  // from 2^127 on
    int32_t scale = int32_t(uint32_t(bits(real(amax) * (1.0f / p.largest))) + 0xFFFF) & ~0xFFFF;
    if (amax < 0x08800000) scale = 0x3F800000;  // below 2^-110: 1
    if (poisoned) scale = 0x7FC00000;
    const float inverse = 1.0f / real(scale);
    p.scales[i_block] = uint16_t(scale >> 16);
    uint8_t* __restrict c = p.at(i_block);
    if (poisoned) {
        std::fill(c, c + p.bytes(), p.largest == 7 ? 0x88 : 0);
    } else if (p.largest == 7) {
        for (int i = 0; i < half; ++i)
            c[i] = uint8_t((whole(v[i] * inverse) + 8) | (whole(v[i + half] * inverse) + 8) << 4);
    } else if (p.largest == 127) {
        for (int i = 0; i < block; ++i) c[i] = uint8_t(whole(v[i] * inverse));
    } else {
        for (int i = 0; i < block; ++i) c[i] = to_e4m3(v[i] * inverse);
    }
    if (i_block + 1 == p.blocks) p.pad();
    return poisoned;
}

// The errors of earlier calls, as tensors or as int8 payloads.
struct Residual {
    void* data;
    int type;
    int64_t n;  // elements of a row

    Payload row(int64_t i_row, int64_t blocks, int block) const {
        const int64_t bytes = blocks * block + (blocks + 7) / 8 * 16;
        return Payload(static_cast<uint8_t*>(data) + i_row * bytes, blocks, block, 127);
    }
    int count(int64_t i_block, int block) const { return int(std::min<int64_t>(block, n - i_block * block)); }

    // Write v plus the old residual to a payload, and what that leaves in place of the old.
    void encode(const Payload& p, int64_t i_row, int64_t i_block, float* v) const {
        if (type == NONE) {
            quantise(p, i_block, v);
            return;
        }
        const int64_t start = i_row * n + i_block * p.block;
        if (type == INT8) {
            each(row(i_row, p.blocks, p.block), i_block, [&](int i, float x) { v[i] += x; });
        } else {
            float old[MOST];
            load(old, data, type, start, count(i_block, p.block));
            for (int i = 0, to = count(i_block, p.block); i < to; ++i) v[i] += old[i];
        }
        if (quantise(p, i_block, v))
            std::fill(v, v + p.block, 0.0f);
        else
            each(p, i_block, [&](int i, float x) { v[i] -= x; });
        if (type == INT8)
            quantise(row(i_row, p.blocks, p.block), i_block, v);
        else
            store(data, type, start, v, count(i_block, p.block));
    }
};

// Σ c·s of k payloads in their order, times a factor.
void sum(float* v, const uint8_t* payloads, int64_t k, int64_t stride, int64_t blocks, int64_t i_block,
         int block, int largest, float factor) {
    each(Payload(payloads, blocks, block, largest), i_block, [&](int i, float x) { v[i] = x; });
    for (int64_t j = 1; j < k; ++j)
        each(Payload(payloads + j * stride, blocks, block, largest), i_block, [&](int i, float x) { v[i] += x; });
    for (int i = 0; i < block; ++i) v[i] *= factor;
}

}  // namespace

extern "C" {

void encode(const void* x, int x_type, const void* minus, int minus_type, void* residual, int residual_type,
            int64_t n_residual, uint8_t* out, int64_t stride, int64_t n, int block, int largest, int rotation,
            int64_t begin, int64_t end) {
    const int64_t blocks = (n + block - 1) / block;
    const Residual kept{residual, residual_type, n_residual};
    float v[MOST], m[MOST];
    for (int64_t i = begin; i < end; ++i) {
        const int64_t i_row = i / blocks, i_block = i % blocks, start = i_row * n + i_block * block;
        const int count = int(std::min<int64_t>(block, n - i_block * block));
        load(v, x, x_type, start, count);
        if (minus_type != NONE) {
            load(m, minus, minus_type, start, count);
            for (int j = 0; j < count; ++j) v[j] -= m[j];
        }
        std::fill(v + count, v + block, 0.0f);
        if (rotation) rotate(v, block, rotation);
        kept.encode(Payload(out + i_row * stride, blocks, block, largest), i_row, i_block, v);
    }
}

void decode(const uint8_t* payloads, int64_t k, int64_t stride_k, int64_t stride_row, void* out, int type,
            int add, int64_t n, float factor, int block, int largest, int rotation, int64_t begin,
            int64_t end) {
    const int64_t blocks = (n + block - 1) / block;
    float v[MOST], old[MOST];
    for (int64_t i = begin; i < end; ++i) {
        const int64_t i_row = i / blocks, i_block = i % blocks, start = i_row * n + i_block * block;
        const int count = int(std::min<int64_t>(block, n - i_block * block));
        sum(v, payloads + i_row * stride_row, k, stride_k, blocks, i_block, block, largest, factor);
        if (rotation) rotate(v, block, rotation);
        if (add) {
            load(old, out, type, start, count);
            for (int j = 0; j < count; ++j) v[j] += old[j];
        }
        store(out, type, start, v, count);
    }
}

void decode_sum_encode(const uint8_t* payloads, int64_t k, int64_t stride_k, int64_t stride_row, void* residual,
                       int residual_type, int64_t n_residual, uint8_t* out, int64_t stride, int64_t n,
                       float factor, int block, int largest_in, int rotation_in, int largest, int rotation,
                       int64_t begin, int64_t end) {
    const int64_t blocks = (n + block - 1) / block;
    const Residual kept{residual, residual_type, n_residual};
    float v[MOST];
    for (int64_t i = begin; i < end; ++i) {
        const int64_t i_row = i / blocks, i_block = i % blocks;
        sum(v, payloads + i_row * stride_row, k, stride_k, blocks, i_block, block, largest_in, factor);
        if (rotation_in != rotation) {
            if (rotation_in) rotate(v, block, rotation_in);
            if (rotation) rotate(v, block, rotation);
        }
        kept.encode(Payload(out + i_row * stride, blocks, block, largest), i_row, i_block, v);
    }
}

}  // extern "C"
