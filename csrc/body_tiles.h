// The tile instructions of AMX, or, with PM_TILE_MODEL, the same operations on the model of them.
//
// Tile numbers are template arguments, as they are part of the instructions. Written as assembly, since the compiler
// does not know that its own intrinsics read and write memory.

#if defined(PM_TILE_MODEL)
static thread_local TileModel tile_model;
PM_INLINE void tile_configure(const TileConfig& config) { tile_model.configure(&config); }
PM_INLINE void tile_release() { tile_model.release(); }
template <int T>
PM_INLINE void tile_zero() { tile_model.zero(T); }
template <int T>
PM_INLINE void tile_load(const void* from, int64_t stride) { tile_model.load(T, from, stride); }
template <int T>
PM_INLINE void tile_store(void* to, int64_t stride) { tile_model.store(T, to, stride); }
template <int C, int A, int B>
PM_INLINE void tile_dot_bf16() { tile_model.dot_bf16(C, A, B); }
template <int C, int A, int B>
PM_INLINE void tile_dot_int8() { tile_model.dot_int8(C, A, B); }
#else
PM_INLINE void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
PM_INLINE void tile_release() { asm volatile("tilerelease" ::); }
template <int T>
PM_INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T>
PM_INLINE void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
PM_INLINE void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
PM_INLINE void tile_dot_bf16() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B)); }
template <int C, int A, int B>  // signed bytes of A, unsigned ones of B
PM_INLINE void tile_dot_int8() { asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B)); }
#endif
