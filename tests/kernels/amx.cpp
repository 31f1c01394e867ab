// Runs the AMX kernels' machine code and compares it, to the bit, with the same kernels on the model of the tile unit.
//
// On a processor without AMX every tile instruction traps; the handler decodes it and lets a model of its own execute it, so
// that registers, addresses and the stored configuration are those of the code as compiled. With AMX it is the processor
// that is compared with the model. Prints how many instructions were trapped; exits 1 where anything differs.
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/isa_amx.cpp"

namespace pagemill {

const Isa kAvx512Bf16{};  // only the tiled kernels are called

float* scratch(size_t floats) {
    static std::vector<float> memory;
    memory.assign(floats + 16, NAN);  // poisoned
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

namespace {

TileModel unit;
long loads, stores, dots, configurations, releases, zeros;

[[noreturn]] void give_up(const char* what) {
    std::fprintf(stderr, "%s\n", what);
    std::_Exit(2);
}

// The processor's number of a general register to the place where the kernel saved it.
uint64_t general(const ucontext_t& context, int number) {
    static constexpr int kPlaces[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                      REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return static_cast<uint64_t>(context.uc_mcontext.gregs[kPlaces[number]]);
}

void trapped(int, siginfo_t*, void* opaque) {
    ucontext_t& context = *static_cast<ucontext_t*>(opaque);
    auto* at = reinterpret_cast<const uint8_t*>(context.uc_mcontext.gregs[REG_RIP]);
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x84)) give_up("not a tile instruction");
    const int high_index = ~at[1] >> 6 & 1, high_base = ~at[1] >> 5 & 1;  // VEX.X, VEX.B
    const int third = ~at[2] >> 3 & 15, prefix = at[2] & 3;               // vvvv; none, 66, f3, f2
    const int opcode = at[3], mod = at[4] >> 6, reg = at[4] >> 3 & 7, rm = at[4] & 7;
    const uint8_t* next = at + 5;
    uint64_t address = 0, stride = 0;
    if (mod != 3) {
        if (rm == 4) {
            const int scale = *next >> 6, index = (*next >> 3 & 7) + 8 * high_index, base = (*next & 7) + 8 * high_base;
            if ((*next & 7) == 5 && mod == 0) give_up("address without a base");
            ++next;
            address = general(context, base);
            if (index != 4) stride = general(context, index) << scale;
        } else {
            if (rm == 5 && mod == 0) give_up("address relative to the instruction");
            address = general(context, rm + 8 * high_base);
        }
        if (mod == 1) address += static_cast<int8_t>(*next), next += 1;
        if (mod == 2) {
            int32_t offset;
            std::memcpy(&offset, next, 4);
            address += offset, next += 4;
        }
    }
    void* memory = reinterpret_cast<void*>(address);
    try {
        if (opcode == 0x49 && prefix == 0 && mod != 3) unit.configure(reinterpret_cast<void*>(address + stride)), ++configurations;
        else if (opcode == 0x49 && prefix == 0) unit.release(), ++releases;
        else if (opcode == 0x49 && prefix == 3 && mod == 3) unit.zero(reg), ++zeros;
        else if (opcode == 0x4b && prefix == 3) unit.load(reg, memory, stride), ++loads;
        else if (opcode == 0x4b && prefix == 2) unit.store(reg, memory, stride), ++stores;
        else if (opcode == 0x5c && prefix == 2) unit.dot_bf16(reg, rm, third), ++dots;
        else if (opcode == 0x5e && prefix == 2) unit.dot_int8(reg, rm, third), ++dots;
        else give_up("a tile instruction that is not used");
    } catch (const std::exception& error) {
        give_up(error.what());
    }
    context.uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(next);
}

std::mt19937 random_bits(1);

template <class T>
std::vector<T> bytes_of(int64_t n) {
    std::vector<T> found(n);
    for (auto& one : found) one = static_cast<T>(random_bits());
    return found;
}
std::vector<float> floats(int64_t n) {
    std::vector<float> found(n);
    for (auto& one : found) one = static_cast<float>(random_bits() % 2001) / 1000.0f - 1.0f;
    return found;
}
std::vector<bf16> halves(int64_t n) {
    std::vector<bf16> found(n);
    const auto wide = floats(n);
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, &wide[i], 4);
        found[i].bits = random_bits() % 64 ? bits >> 16 : random_bits() % 128;  // some denormals
    }
    return found;
}

void shape(LinearOut<bf16>& p, int64_t m, int64_t n, int64_t k, const std::vector<float>& bias) {
    p.m = m, p.n = n, p.k = k, p.bias = bias.data();
    p.panels_count = (n + kPanel - 1) / kPanel, p.panel_group = 4;
    p.row_blocks = (m + 255) / 256, p.row_block = (m + p.row_blocks - 1) / p.row_blocks;
}

template <class Args, class Kernel>
bool same(Args& p, Kernel real, Kernel model) {
    const int64_t items = p.row_blocks * ((p.panels_count + 3) / 4);
    std::vector<float> one(p.m * p.n, 7.0f), other(p.m * p.n, 8.0f);
    p.out_wide = one.data();
    real(p, 0, items);
    p.out_wide = other.data();
    model(p, 0, items);
    return std::memcmp(one.data(), other.data(), one.size() * 4) == 0;
}

bool linear_agrees(int64_t m, int64_t n, int64_t k) {
    LinearArgs<bf16> p{};
    const auto bias = floats((n + 31) / 32 * 32);
    shape(p, m, n, k, bias);
    const auto x = halves(m * k), panels = halves(p.panels_count * ((k + 1) / 2) * 2 * kPanel);
    p.x = x.data(), p.ldx = k, p.panels = panels.data();
    return same(p, kAmx.b16.linear, kAmxEmulated.b16.linear);
}

bool quantized_agrees(int64_t m, int64_t n, int64_t k, int64_t group) {
    QLinearArgs<bf16> p{};
    const auto bias = floats((n + 31) / 32 * 32);
    shape(p, m, n, k, bias);
    QuantizedRows& rows = p.rows;
    rows.m = m, rows.k = k, rows.group = group ? group : k, rows.groups = (k + rows.group - 1) / rows.group;
    auto x = bytes_of<int8_t>((k + kChunk - 1) / kChunk * m * kChunkStride);
    for (int64_t r = 0; r < m; ++r)
        for (int64_t c = k; c < (k + 63) / 64 * 64; ++c) x[(c / kChunk * m + r) * kChunkStride + c % kChunk] = 0;
    auto x_scales = floats(m * rows.groups), scales = floats(p.panels_count * rows.groups * kPanel);
    auto sums = bytes_of<int32_t>(m * rows.groups);
    for (auto& one : sums) one %= 16384;
    auto zeros = bytes_of<uint8_t>(scales.size());
    for (auto& one : zeros) one %= 16;
    const auto panels = bytes_of<uint8_t>(p.panels_count * (group ? (k + 7) / 8 : (k + 3) / 4) * kPanel * 4);
    rows.x = x.data(), rows.scales = x_scales.data(), rows.sums = sums.data();
    p.panels = panels.data(), p.scales = scales.data(), p.zeros = group ? zeros.data() : nullptr;
    return same(p, kAmx.b16.qlinear, kAmxEmulated.b16.qlinear);
}

template <class F>
bool faults(const F& act) {
    TileModel tiles;
    TileConfig config;
    for (int t = 0; t < 8; ++t) config.rows[t] = 16, config.row_bytes[t] = 64;
    try {
        act(tiles, config);
    } catch (const std::logic_error&) {
        return true;
    }
    return false;
}

bool model_faults() {
    uint8_t memory[1024] = {};
    return !faults([&](TileModel& t, TileConfig& c) { t.configure(&c), t.load(1, memory, 64), t.dot_int8(0, 1, 2); }) &&
           faults([&](TileModel& t, TileConfig&) { t.zero(0); }) &&
           faults([&](TileModel& t, TileConfig& c) { c.palette = 2, t.configure(&c); }) &&
           faults([&](TileModel& t, TileConfig& c) { c.reserved[3] = 1, t.configure(&c); }) &&
           faults([&](TileModel& t, TileConfig& c) { c.rows[2] = 17, t.configure(&c); }) &&
           faults([&](TileModel& t, TileConfig& c) { c.row_bytes[2] = 0, t.configure(&c); }) &&
           faults([&](TileModel& t, TileConfig& c) { c.rows[8] = 1, c.row_bytes[8] = 4, t.configure(&c); }) &&
           faults([&](TileModel& t, TileConfig& c) { t.configure(&c), t.dot_bf16(0, 1, 1); }) &&
           faults([&](TileModel& t, TileConfig& c) { c.rows[1] = 8, t.configure(&c), t.dot_bf16(0, 1, 2); }) &&
           faults([&](TileModel& t, TileConfig& c) { c.rows[2] = 8, t.configure(&c), t.dot_bf16(0, 1, 2); }) &&
           faults([&](TileModel& t, TileConfig& c) { t.configure(&c), t.release(), t.zero(0); });
}

}  // namespace
}  // namespace pagemill

int main() {
    using namespace pagemill;
    syscall(SYS_arch_prctl, 0x1023, 18);  // permission, where there are tiles
    struct sigaction action {};
    action.sa_sigaction = trapped;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
    int wrong = 0;
    const auto check = [&](bool holds, const char* what, int64_t m, int64_t n, int64_t k, int64_t group) {
        if (holds) return;
        ++wrong;
        std::printf("%s differs: m %ld n %ld k %ld group %ld\n", what, long(m), long(n), long(k), long(group));
    };
    check(model_faults(), "a fault", 0, 0, 0, 0);
    struct Shape {
        int64_t m, n, k;
    };
    for (const auto& [m, n, k] : {Shape{1, 1, 1}, {1, 96, 700}, {15, 40, 320}, {16, 33, 65}, {17, 64, 331},
                                  {40, 70, 1029}, {300, 32, 96}}) {
        check(linear_agrees(m, n, k), "linear", m, n, k, 0);
        for (const int64_t group : {0, 32, 64, 128}) check(quantized_agrees(m, n, k, group), "qlinear", m, n, k, group);
    }
    std::printf("trapped: %ld configurations, %ld releases, %ld zeros, %ld loads, %ld stores, %ld products\n",
                configurations, releases, zeros, loads, stores, dots);
    return wrong ? 1 : 0;
}
