// The emulated machine of `host.h`: fibers, barriers, the matrix instructions, guarded memory, and the launch. One launch at
// a time per thread of the operating system; several such threads are independent.
#include "kernel.h"
#include "weight.h"

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace machine {

constexpr size_t STACK = 64 * 1024;
constexpr u32 MOST_THREADS = 1024;
constexpr size_t SHARED_LIMIT = 227 * 1024;  // a block of sm_90
constexpr size_t STATIC_LIMIT = 48 * 1024;
constexpr int STATIC_SITES = 256;
constexpr size_t CANARY = 64;
constexpr u8 POISON = 0xff;  // NaN in f32 and bf16, the largest unsigned integer
constexpr u8 CANARY_BYTE = 0xa5;

__thread Fiber* running;
__thread Block block;

#if defined(__x86_64__)
// Saves the callee's registers and the stack pointer, and switches to another stack. The C library's swapcontext queries the
// kernel for the signal mask each time, which is a hundred times slower.
asm(R"(
.text
.hidden machine_switch
.globl machine_switch
.type machine_switch, @function
machine_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size machine_switch, .-machine_switch
)");
extern "C" void machine_switch(void** save, void* take_up);

static void prepare(void** stack_pointer, u8* stack, void (*start)()) {
    // As at a function's entry: 8 past a multiple of 16.
    u64* top = reinterpret_cast<u64*>(stack + STACK) - 2;
    *top = reinterpret_cast<u64>(start);
    top -= 6;
    memset(top, 0, 6 * sizeof(u64));
    *stack_pointer = top;
}
#else
// Elsewhere the C library's contexts: slow but portable. A "stack pointer" is a context.
static thread_local ucontext_t contexts[MOST_THREADS + 1];
static thread_local u32 contexts_used;

static void machine_switch(void** save, void* take_up) {
    if (*save == nullptr) *save = &contexts[MOST_THREADS];
    swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(take_up));
}

static void prepare(void** stack_pointer, u8* stack, void (*start)()) {
    ucontext_t* context = &contexts[contexts_used++ % MOST_THREADS];
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = STACK;
    context->uc_link = nullptr;
    makecontext(context, start, 0);
    *stack_pointer = context;
}
#endif

static size_t page() {
    static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return size;
}

static size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Pages followed by a guard page.
static u8* guarded_pages(size_t bytes) {
    void* at = mmap(nullptr, bytes + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    mprotect(static_cast<u8*>(at) + bytes, page(), PROT_NONE);
    return static_cast<u8*>(at);
}

struct Copy {
    u8* to;
    const u8* from;
    bool valid;
    bool committed;
    int group;
};

struct Bulk {
    u8* to;
    const u8* from;
    u32 bytes;
};

// An mbarrier: the current phase, the number of missing arrivals, the bytes that were announced and the copies that were
// started.
struct Phases {
    u32 arrivals, missing, phase;
    u64 announced, begun;
    std::vector<Bulk> copies;
    std::vector<Fiber*> waiting;
};

struct Machine {
    std::vector<u8*> stacks;
    std::map<const u64*, Phases> phases;
    Fiber fibers[MOST_THREADS];
    Meeting meetings[MOST_THREADS / 32][32];
    std::vector<Copy> copies[MOST_THREADS];
    int groups[MOST_THREADS];
    void* scheduler;
    u32 lane_order[32];
    u32 turn;  // the running lane's index in `lane_order`

    u8* shared = nullptr;  // ends at a guard page
    u8* statics = nullptr;
    size_t shared_bytes, statics_used;
    struct { u8* at; size_t bytes; } sites[STATIC_SITES];

    const Entry* entry;
    const void* parameters;
    u64 seed;
    int order;
    sigjmp_buf out;
    bool launching = false;
    std::string message;
};

// Kept until its thread ends: fibers may remain in the middle of a kernel.
static thread_local Machine* own;

static Entry*& entries() {
    static Entry* first = nullptr;
    return first;
}

Entry::Entry(const char* name, Call call, size_t bytes) : name(name), call(call), bytes(bytes), next(entries()) {
    entries() = this;
}

void fail(const char* message) {
    char text[400];
    snprintf(text, sizeof text, "%s (block %u, thread %u)", message, block.index.x, running ? running->thread.x : 0);
    own->message = text;
    siglongjmp(own->out, 1);
}

static struct sigaction before[4];
static const int SIGNALS[4] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};

static void caught(int number, siginfo_t* info, void*) {
    if (own != nullptr && own->launching) {
        fail(number == SIGSEGV || number == SIGBUS ? "access outside of shared memory, an allocation or the stack"
                                                   : "misaligned access, index outside of an array, or division by zero");
    }
    // Not from a kernel: restores the previous handler and raises the signal again.
    for (int i = 0; i < 4; i++) {
        if (SIGNALS[i] == number) sigaction(number, &before[i], nullptr);
    }
    (void)info;
}

static void catch_signals() {
    static const bool once = [] {
        struct sigaction action = {};
        action.sa_sigaction = caught;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 4; i++) sigaction(SIGNALS[i], &action, &before[i]);
        return true;
    }();
    (void)once;
}

static u64 next(u64& state) {
    state += 0x9e3779b97f4a7c15ull;
    u64 z = state;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

// 0, 1, .. in the launch's order.
static void arrange(u32* places, u32 count) {
    for (u32 i = 0; i < count; i++) places[i] = own->order == 1 ? count - 1 - i : i;
    if (own->order < 2) return;
    for (u32 i = count; i > 1; i--) std::swap(places[i - 1], places[next(own->seed) % i]);
}

// The next lane of a warp in this round that can run, from index `turn` of the order on; null at the end of the round.
static Fiber* next_lane(Fiber* warp, u32 turn) {
    for (; turn < 32; turn++) {
        Fiber& fiber = warp[own->lane_order[turn]];
        if (fiber.ended || fiber.waits != nullptr) continue;
        own->turn = turn;
        return &fiber;
    }
    return nullptr;
}

// Switches to the warp's next lane of this round, or to the scheduler.
static void yield() {
    Fiber* self = running;
    Fiber* next = next_lane(&own->fibers[self->warp * 32], own->turn + 1);
    if (next == nullptr) {
        machine_switch(&self->stack_pointer, own->scheduler);
    } else {
        running = next;
        machine_switch(&self->stack_pointer, next->stack_pointer);
    }
}

static void first_step() {
    own->entry->call(own->parameters);
    if (!running->synchronised) fail("a thread ends without grid_dependency_synchronize");
    running->ended = true;
    yield();
}

bool meet(const char* what, u32 mask, const void* in, void* out, Meeting** meeting) {
    u32 lane = running->lane;
    if (mask == 0 || !(mask >> lane & 1)) fail("a lane executes an instruction with a mask that excludes it");
    Meeting& m = own->meetings[running->warp][__builtin_ctz(mask)];
    if (m.arrived == 0) {
        m.what = what;
        m.mask = mask;
    } else if (m.mask != mask || (m.what != what && strcmp(m.what, what) != 0)) {
        fail("lanes of a warp wait at different instructions");
    }
    m.in[lane] = in;
    m.out[lane] = out;
    m.arrived |= 1u << lane;
    *meeting = &m;
    running->waits = what;
    return m.arrived == mask;
}

void dismiss(Meeting& m) {
    m.arrived = 0;
    Fiber* warp = &own->fibers[running->warp * 32];
    for (u32 lane = 0; lane < 32; lane++) {
        if (m.mask >> lane & 1) warp[lane].waits = nullptr;
    }
}

void wait() { yield(); }

void barrier(int number, u32 threads, const char* what) {
    if (number < 0 || number > 15 || threads % 32 != 0) fail("a barrier without such a number or of part of a warp");
    running->barrier = number | (int)(threads << 4);
    running->waits = what;
    yield();
}

u8* dynamic_memory() { return own->shared + rounded(SHARED_LIMIT, page()) - own->shared_bytes; }

void* static_memory(int site, size_t bytes) {
    if (site >= STATIC_SITES) fail("more shared arrays than the machine supports");
    auto& place = own->sites[site];
    if (place.at == nullptr) {
        place.at = own->statics + own->statics_used;
        place.bytes = bytes;
        own->statics_used += rounded(bytes, 16) + CANARY;
        if (own->statics_used > STATIC_LIMIT) fail("more than 48 KiB of SHARED memory");
        memset(place.at, POISON, bytes);
        memset(place.at + bytes, CANARY_BYTE, rounded(bytes, 16) + CANARY - bytes);
    }
    return place.at;
}

void copy_begin(void* shared, const void* global, bool valid) {
    if ((u64)shared % 16 != 0 || (valid && (u64)global % 16 != 0)) fail("a misaligned asynchronous copy");
    u32 self = running->thread.x;
    memset(shared, POISON, 16);
    own->copies[self].push_back({static_cast<u8*>(shared), static_cast<const u8*>(global), valid, false, 0});
}

void copy_commit() {
    u32 self = running->thread.x;
    int group = own->groups[self]++;
    for (Copy& copy : own->copies[self]) {
        if (!copy.committed) {
            copy.committed = true;
            copy.group = group;
        }
    }
}

void copy_wait(int left) {
    u32 self = running->thread.x;
    std::vector<Copy>& copies = own->copies[self];
    size_t kept = 0;
    for (Copy& copy : copies) {
        if (!copy.committed || copy.group >= own->groups[self] - left) {
            copies[kept++] = copy;
        } else if (copy.valid) {
            memcpy(copy.to, copy.from, 16);
        } else {
            memset(copy.to, 0, 16);
        }
    }
    copies.resize(kept);
}

static bool in_shared(const void* at, size_t bytes) {
    const u8* start = static_cast<const u8*>(at);
    auto within = [&](const u8* from, size_t size) { return start >= from && start + bytes <= from + size; };
    return within(dynamic_memory(), own->shared_bytes) || within(own->statics, own->statics_used);
}

static Phases& phases_of(const u64* barrier) {
    auto found = own->phases.find(barrier);
    if (found == own->phases.end()) fail("an mbarrier that was not initialised");
    return found->second;
}

// Completes the phase if all arrivals and bytes are there: copies become visible, waiting threads continue.
static bool settle(Phases& b) {
    if (b.missing != 0 || b.announced != b.begun) return false;
    for (const Bulk& copy : b.copies) memcpy(copy.to, copy.from, copy.bytes);
    b.copies.clear();
    b.announced = b.begun = 0;
    b.missing = b.arrivals;
    b.phase++;
    for (Fiber* fiber : b.waiting) fiber->waits = nullptr;
    b.waiting.clear();
    return true;
}

void phase_init(u64* barrier, u32 arrivals) {
    if ((u64)barrier % 8 != 0 || !in_shared(barrier, 8) || arrivals == 0) fail("an mbarrier with a wrong address or number of arrivals");
    own->phases[barrier] = {arrivals, arrivals, 0, 0, 0, {}, {}};
}

void phase_arrive(u64* barrier, u32 bytes) {
    Phases& b = phases_of(barrier);
    // A phase that no thread has waited for so far is complete when the next begins.
    if (b.missing == 0 && !settle(b)) fail("more arrivals at an mbarrier than it was initialised for");
    b.missing--;
    b.announced += bytes;
    if (!b.waiting.empty()) settle(b);
}

void phase_wait(u64* barrier, u32 parity) {
    Phases& b = phases_of(barrier);
    if (parity > 1) fail("a parity that is neither 0 nor 1");
    while ((b.phase & 1) == parity && !settle(b)) {
        b.waiting.push_back(running);
        running->waits = "the phase of an mbarrier";
        yield();
    }
}

void copy_bulk(void* shared, const void* global, u32 bytes, u64* barrier) {
    Phases& b = phases_of(barrier);
    if ((u64)shared % 16 != 0 || (u64)global % 16 != 0 || bytes % 16 != 0 || bytes == 0) fail("a misaligned bulk copy");
    if (!in_shared(shared, bytes)) fail("a bulk copy outside of shared memory");
    memset(shared, POISON, bytes);
    b.copies.push_back({static_cast<u8*>(shared), static_cast<const u8*>(global), bytes});
    b.begun += bytes;
    if (!b.waiting.empty()) settle(b);
}

// c += a b with both gathered from the lanes; the sum over k in order.
template <int depth>
static void multiply(Meeting& m, const float (&a)[16][depth], const float (&b)[depth][8]) {
    float c[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const float* own_c = static_cast<const float*>(m.out[lane]);
        int row = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 4; i++) c[row + i / 2 * 8][column + i % 2] = own_c[i];
    }
    for (int row = 0; row < 16; row++) {
        for (int k = 0; k < depth; k++) {
            for (int column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        float* own_c = static_cast<float*>(m.out[lane]);
        int row = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 4; i++) own_c[i] = c[row + i / 2 * 8][column + i % 2];
    }
}

// The halves of a word, widened.
static void widened_bf16(u32 word, float (&halves)[2]) {
    halves[0] = low(word);
    halves[1] = high(word);
}
static void widened_f16(u32 word, float (&halves)[2]) {
    halves[0] = widen_half((u16)word);
    halves[1] = widen_half((u16)(word >> 16));
}

template <void widened(u32, float (&)[2])>
static void multiply_halves(Meeting& m) {
    float a[16][16], b[16][8], two[2];
    for (int lane = 0; lane < 32; lane++) {
        const Operands& in = *static_cast<const Operands*>(m.in[lane]);
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) {
            int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
            widened(in.a[i], two);
            a[row][column] = two[0];
            a[row][column + 1] = two[1];
        }
        for (int i = 0; i < 2; i++) {
            widened(in.b[i], two);
            b[2 * t + 8 * i][g] = two[0];
            b[2 * t + 8 * i + 1][g] = two[1];
        }
    }
    multiply(m, a, b);
}

void multiply_bf16(Meeting& m) { multiply_halves<widened_bf16>(m); }
void multiply_f16(Meeting& m) { multiply_halves<widened_f16>(m); }

void multiply_tf32(Meeting& m) {
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; lane++) {
        const Operands& in = *static_cast<const Operands*>(m.in[lane]);
        int g = lane / 4, t = lane % 4;
        // The device ignores the lower bits.
        for (int i = 0; i < 4; i++) a[g + i % 2 * 8][t + i / 2 * 4] = __uint_as_float(in.a[i] & 0xffffe000);
        for (int i = 0; i < 2; i++) b[t + 4 * i][g] = __uint_as_float(in.b[i] & 0xffffe000);
    }
    multiply(m, a, b);
}

void load_matrices(Meeting& m) {
    const Rows& first = *static_cast<const Rows*>(m.in[0]);
    for (int matrix = 0; matrix < first.matrices; matrix++) {
        u16 values[8][8];
        for (int row = 0; row < 8; row++) {
            const void* at = static_cast<const Rows*>(m.in[8 * matrix + row])->row;
            if ((u64)at % 16 != 0) fail("a misaligned row of ldmatrix");
            memcpy(values[row], at, 16);
        }
        for (int lane = 0; lane < 32; lane++) {
            int g = lane / 4, t = lane % 4 * 2;
            u32 lower = first.transposed ? values[t][g] : values[g][t];
            u32 upper = first.transposed ? values[t + 1][g] : values[g][t + 1];
            static_cast<u32*>(m.out[lane])[matrix] = lower | upper << 16;
        }
    }
}

void store_matrices(Meeting& m) {
    for (int matrix = 0; matrix < 4; matrix++) {
        u16 values[8][8];
        for (int lane = 0; lane < 32; lane++) {
            int g = lane / 4, t = lane % 4 * 2;
            u32 word = static_cast<const Stored*>(m.in[lane])->words[matrix];
            values[t][g] = (u16)word;
            values[t + 1][g] = (u16)(word >> 16);
        }
        for (int row = 0; row < 8; row++) {
            void* at = static_cast<const Stored*>(m.in[8 * matrix + row])->row;
            if ((u64)at % 16 != 0) fail("a misaligned row of stmatrix");
            memcpy(at, values[row], 16);
        }
    }
}

// Releases the threads of full barriers; false if there are none.
static bool release(u32 threads) {
    bool released = false;
    for (int number = 0; number < 16; number++) {
        u32 arrived = 0, alive = 0, wanted = 0;
        for (u32 i = 0; i < threads; i++) {
            const Fiber& fiber = own->fibers[i];
            alive += !fiber.ended;
            if (fiber.ended || fiber.barrier < 0 || (fiber.barrier & 15) != number) continue;
            arrived++;
            wanted = (u32)fiber.barrier >> 4;
        }
        // As on the device, threads that have ended are not waited for.
        if (arrived == 0 || arrived != (wanted == 0 ? alive : wanted)) continue;
        for (u32 i = 0; i < threads; i++) {
            Fiber& fiber = own->fibers[i];
            if (fiber.barrier < 0 || (fiber.barrier & 15) != number) continue;
            fiber.barrier = -1;
            fiber.waits = nullptr;
        }
        released = true;
    }
    return released;
}

static void check_canaries() {
    const u8* start = dynamic_memory();
    bool whole = true;
    for (size_t i = 1; i <= CANARY; i++) whole &= start[-(ptrdiff_t)i] == CANARY_BYTE;
    for (const auto& site : own->sites) {
        if (site.at == nullptr) continue;
        for (size_t i = site.bytes; i < rounded(site.bytes, 16) + CANARY; i++) whole &= site.at[i] == CANARY_BYTE;
    }
    if (!whole) fail("a write outside of an array in shared memory");
}

static void run_block(u32 threads) {
    Machine& m = *own;
    memset(dynamic_memory(), POISON, m.shared_bytes);
    memset(dynamic_memory() - CANARY, CANARY_BYTE, CANARY);
    memset(m.sites, 0, sizeof m.sites);
    m.statics_used = 0;
    m.phases.clear();
    u32 warps = threads / 32;
    for (u32 i = 0; i < threads; i++) {
        m.fibers[i] = {nullptr, {i, 0, 0}, i % 32, i / 32, nullptr, -1, false, false};
        prepare(&m.fibers[i].stack_pointer, m.stacks[i], first_step);
        m.copies[i].clear();
        m.groups[i] = 0;
    }
    for (u32 warp = 0; warp < warps; warp++) {
        for (Meeting& meeting : m.meetings[warp]) meeting.arrived = 0;
    }
    u32 warp_order[32];
    for (;;) {
        arrange(warp_order, warps);
        arrange(m.lane_order, 32);
        for (u32 w = 0; w < warps; w++) {
            // Each round visits every lane that can run; the lanes switch to each other.
            while (Fiber* first = next_lane(&m.fibers[warp_order[w] * 32], 0)) {
                running = first;
                machine_switch(&m.scheduler, first->stack_pointer);
            }
        }
        if (release(threads)) continue;
        // A warp's arrival may have released another one that was visited before it.
        bool ready = false;
        for (u32 i = 0; i < threads; i++) ready |= !m.fibers[i].ended && m.fibers[i].waits == nullptr;
        if (ready) continue;
        for (u32 i = 0; i < threads; i++) {
            if (m.fibers[i].ended) continue;
            running = &m.fibers[i];
            char text[200];
            snprintf(text, sizeof text, "waits forever at %s", running->waits);
            fail(text);
        }
        break;
    }
    for (const auto& [at, phases] : m.phases) {
        if (!phases.copies.empty()) fail("the block ends with bulk copies in flight");
    }
    check_canaries();
}

// A thread that ends gives back what its launches used: a group of devices starts a thread for each of them in each step.
struct AtExit {
    ~AtExit() {
        if (own == nullptr) return;
        for (u8* stack : own->stacks) munmap(stack - page(), STACK + page());
        munmap(own->shared - page(), rounded(SHARED_LIMIT, page()) + 2 * page());
        munmap(own->statics, STATIC_LIMIT + 2 * page());
        delete own;
        own = nullptr;
    }
};
static thread_local AtExit at_exit;

static void ready(u32 threads) {
    if (own == nullptr) {
        (void)&at_exit;
        own = new Machine();
        own->shared = guarded_pages(rounded(SHARED_LIMIT, page()) + page()) + page();
        own->statics = guarded_pages(STATIC_LIMIT + page());
    }
    while (own->stacks.size() < threads) {
        // Stacks grow downwards: the guard page is below.
        u8* at = static_cast<u8*>(mmap(nullptr, STACK + page(), PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        mprotect(at, page(), PROT_NONE);
        own->stacks.push_back(at + page());
    }
}

}  // namespace machine

using namespace machine;

// Memory of the machine, poisoned, followed by a guard page. Null if there is not enough memory.
extern "C" void* emulated_allocate(u64 bytes) {
    size_t whole = rounded(rounded(bytes, 16), page());
    u8* at = guarded_pages(whole);
    if (at == nullptr) return nullptr;
    memset(at, POISON, whole);
    return at + whole - rounded(bytes, 16);
}

extern "C" void emulated_free(void* memory, u64 bytes) {
    size_t whole = rounded(rounded(bytes, 16), page());
    munmap(static_cast<u8*>(memory) + rounded(bytes, 16) - whole, whole + page());
}

// Runs a kernel to its end. `parameters` are `bytes` of its struct, aligned to 8. `order`: 0 forward, 1 reverse, others seed a
// shuffle. Returns 0, or 1 with a message.
extern "C" int emulated_launch(const char* name, const u32* grid, u32 threads, u32 shared_bytes, const void* parameters,
                               u64 bytes, u64 order, char* message, u64 message_bytes) {
    catch_signals();
    ready(threads);
    Machine& m = *own;
    auto refuse = [&](const std::string& text) {
        snprintf(message, message_bytes, "%s: %s", name, text.c_str());
        return 1;
    };
    const Entry* entry = entries();
    while (entry != nullptr && strcmp(entry->name, name) != 0) entry = entry->next;
    if (entry == nullptr) return refuse("no such kernel");
    if (bytes != entry->bytes) {
        return refuse(std::to_string(bytes) + " bytes of parameters, expected " + std::to_string(entry->bytes));
    }
    if (threads == 0 || threads % 32 != 0 || threads > MOST_THREADS) return refuse("a block of a wrong size");
    if (shared_bytes % 16 != 0 || shared_bytes > SHARED_LIMIT) return refuse("shared memory of a wrong size");
    if (grid[1] > 65535 || grid[2] > 65535 || grid[0] > 0x7fffffff || grid[0] == 0 || grid[1] == 0 || grid[2] == 0) {
        return refuse("a grid of a wrong size");
    }
    m.entry = entry;
    m.parameters = parameters;
    m.shared_bytes = shared_bytes;
    m.order = order > 2 ? 2 : (int)order;
    m.seed = order;
    m.message.clear();
    running = nullptr;
    m.launching = true;
    if (sigsetjmp(m.out, 1) == 0) {
        std::vector<u32> places(grid[0]);
        arrange(places.data(), grid[0]);
        for (u32 z = 0; z < grid[2]; z++) {
            for (u32 y = 0; y < grid[1]; y++) {
                for (u32 x : places) {
                    block = {{x, y, z}, {threads, 1, 1}, {grid[0], grid[1], grid[2]}};
                    run_block(threads);
                }
            }
        }
    }
    m.launching = false;
    return m.message.empty() ? 0 : refuse(m.message);
}
