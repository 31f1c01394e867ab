// Everything one instruction set compiles, inside its namespace: no header of the standard library in here, or its
// inline functions would be emitted with that instruction set for the whole program.
#include "body_simd.h"
#include "body_gemm.h"
#include "body_linear.h"
#include "body_qlinear.h"
#include "body_elementwise.h"
#include "body_attention_tile.h"
#include "body_attention_words.h"
#include "body_attention.h"
#include "body_patchify.h"

template <class T>
constexpr TypedKernels<T> typed_table() {
    return {&linear<T>, kVectorBlocking, &qlinear<T>, kVectorBlocking, &quantize_rows<T>, &pack_int8<T>, &pack_int4<T>,
            &dequantize<T>, &rms_norm<T>, &swiglu<T>, &gelu<T>, &rotary<T>, &attention<T, T>, &join_ranges<T, T>,
            &attention<T, int8_t>, &join_ranges<T, int8_t>, &pixel_values<T>};
}

constexpr Isa table(const char* name) { return {name, &greedy, &patchify, typed_table<float>(), typed_table<bf16>()}; }
