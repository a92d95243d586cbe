// Counting CPU allocator: live bytes, peak, timeline and a cap for every CPU tensor made after installation.
//
// Linked to libc10 alone and tied to torch's minor version, because c10::SetCPUAllocator is not in the stable
// ABI. Plain C interface for ctypes; once installed it stays for the life of the process (blocks it handed
// out carry its deleter). Not recording and not capped, it costs a few relaxed atomic operations per
// allocation or free.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <mutex>
#include <vector>

namespace {

constexpr size_t kHeaderBytes = 64;  // keeps the 64-byte alignment that c10::alloc_cpu promises
constexpr size_t kOverheadBytes = 2 * kHeaderBytes;
constexpr uintptr_t kPageBytes = 4096;  // of the smallest pages; larger ones are multiples
constexpr size_t kTimelineCapacity = 16384;
constexpr uint64_t kOwnerTag = 0x9e3779b97f4a7c15ULL;
constexpr int64_t kNoCap = -1;

struct Header {
  uint64_t nbytes;
  uint64_t owner;   // kOwnerTag ^ address of the data; cleared on free
  uint64_t offset;  // of the data in the block that c10::alloc_cpu gave
};
static_assert(sizeof(Header) <= kHeaderBytes);

struct Sample {
  int64_t time_ns;
  int64_t live_bytes;
};

std::atomic<int64_t> live_bytes{0};
std::atomic<int64_t> cap_bytes{kNoCap};
std::atomic<int64_t> refused_count{0};
std::atomic<bool> recording{false};

// Guards everything below; taken only while recording.
std::mutex record_mutex;
int64_t peak_bytes = 0;
std::vector<Sample> timeline;
size_t events_per_sample = 1;
size_t events_in_last_sample = 0;
std::chrono::steady_clock::time_point record_start;

bool is_page_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kPageBytes == 0; }

Header* header_of(void* data) { return reinterpret_cast<Header*>(static_cast<char*>(data) - kHeaderBytes); }

// Halves the timeline by joining neighbours; each pair keeps its larger sample, so the peak is never lost.
void halve_timeline() {
  const size_t pairs = timeline.size() / 2;
  for (size_t i = 0; i < pairs; ++i) {
    const Sample first = timeline[2 * i];
    const Sample second = timeline[2 * i + 1];
    timeline[i] = first.live_bytes >= second.live_bytes ? first : second;
  }
  timeline.resize(pairs);
  events_per_sample *= 2;
}

void record_locked(int64_t live) {
  peak_bytes = std::max(peak_bytes, live);
  const auto elapsed = std::chrono::steady_clock::now() - record_start;
  const Sample sample{std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count(), live};
  if (events_in_last_sample > 0 && events_in_last_sample < events_per_sample) {
    ++events_in_last_sample;
    if (live > timeline.back().live_bytes) timeline.back() = sample;
    return;
  }
  if (timeline.size() == kTimelineCapacity) halve_timeline();
  timeline.push_back(sample);
  events_in_last_sample = 1;
}

// Adds to the live bytes, or returns false where that would pass the cap.
bool try_add(int64_t nbytes) {
  const int64_t cap = cap_bytes.load(std::memory_order_relaxed);
  if (cap == kNoCap) {
    live_bytes.fetch_add(nbytes, std::memory_order_relaxed);
    return true;
  }
  int64_t live = live_bytes.load(std::memory_order_relaxed);
  do {
    if (nbytes > cap - live) return false;  // both sides cannot overflow: live and cap are not negative
  } while (!live_bytes.compare_exchange_weak(live, live + nbytes, std::memory_order_relaxed));
  return true;
}

// While recording, counting and recording are one step, so that samples are in the order of the counts.
bool count_allocation(int64_t nbytes) {
  if (!recording.load(std::memory_order_relaxed)) return try_add(nbytes);
  const std::lock_guard<std::mutex> lock(record_mutex);
  if (!try_add(nbytes)) return false;
  record_locked(live_bytes.load(std::memory_order_relaxed));
  return true;
}

void count_free(int64_t nbytes) {
  if (!recording.load(std::memory_order_relaxed)) {
    live_bytes.fetch_sub(nbytes, std::memory_order_relaxed);
    return;
  }
  const std::lock_guard<std::mutex> lock(record_mutex);
  record_locked(live_bytes.fetch_sub(nbytes, std::memory_order_relaxed) - nbytes);
}

// The one deleter of allocate and raw_deleter, which c10::Allocator requires to be the same.
void release(void* data) {
  if (data == nullptr) return;
  c10::profiledCPUMemoryReporter().Delete(data);
  // oneDNN keeps blocks it took by raw_allocate before we were installed and gives them back through our
  // raw_deleter. Those carry no header, and what lies before one is not ours: it may be unmapped where the block
  // begins a page, so blocks of ours never do; within a page it can be read.
  Header* header = header_of(data);
  if (is_page_aligned(data) || header->owner != (kOwnerTag ^ reinterpret_cast<uint64_t>(data))) {
    c10::free_cpu(data);
    return;
  }
  header->owner = 0;
  count_free(static_cast<int64_t>(header->nbytes));
  c10::free_cpu(static_cast<char*>(data) - header->offset);
}

class CountingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t nbytes) override {
    if (nbytes == 0) return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
    // More than that no machine has; c10::alloc_cpu says so where no cap does.
    constexpr size_t kMaxBytes = std::numeric_limits<int64_t>::max() - kOverheadBytes;
    nbytes = std::min(nbytes, kMaxBytes);
    if (!count_allocation(static_cast<int64_t>(nbytes))) {
      refused_count.fetch_add(1, std::memory_order_relaxed);
      c10::profiledCPUMemoryReporter().OutOfMemory(nbytes);
      TORCH_CHECK_WITH(OutOfMemoryError, false, "gradkern cap: allocating ", nbytes, " bytes with ",
                       live_bytes.load(std::memory_order_relaxed), " live would pass the cap of ",
                       cap_bytes.load(std::memory_order_relaxed), " bytes");
    }
    void* block = nullptr;
    try {
      block = c10::alloc_cpu(nbytes + kOverheadBytes);
    } catch (...) {
      count_free(static_cast<int64_t>(nbytes));
      throw;
    }
    size_t offset = kHeaderBytes;
    if (is_page_aligned(static_cast<char*>(block) + offset)) offset += kHeaderBytes;
    void* data = static_cast<char*>(block) + offset;
    *header_of(data) = Header{nbytes, kOwnerTag ^ reinterpret_cast<uint64_t>(data), offset};
    c10::profiledCPUMemoryReporter().New(data, nbytes);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  // oneDNN paths use raw_allocate, which needs this and context == data.
  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* dest, const void* src, size_t count) const override { default_copy_data(dest, src, count); }
};

}  // namespace

#define GRADKERN_API extern "C" __attribute__((visibility("default")))

// "major.minor" of the torch this was compiled against, as 1000 * major + minor.
GRADKERN_API int64_t gradkern_alloc_torch_version() { return 1000 * TORCH_VERSION_MAJOR + TORCH_VERSION_MINOR; }

// 0: installed (now or before). 1: another library has replaced torch's allocator, nothing was done.
GRADKERN_API int gradkern_alloc_install() {
  static CountingAllocator* allocator = new CountingAllocator();  // outlives every static destructor
  c10::Allocator* current = c10::GetCPUAllocator();
  if (current == allocator) return 0;
  if (current != c10::GetDefaultCPUAllocator()) return 1;
  c10::SetCPUAllocator(allocator);
  return c10::GetCPUAllocator() == allocator ? 0 : 1;
}

GRADKERN_API int64_t gradkern_alloc_live_bytes() { return live_bytes.load(std::memory_order_relaxed); }

// Whether the storage at this address (UntypedStorage._cdata) holds a block of ours.
GRADKERN_API int gradkern_alloc_owns(const void* storage_impl) {
  const auto* storage = static_cast<const c10::StorageImpl*>(storage_impl);
  return storage->data_ptr().get_deleter() == &release ? 1 : 0;
}

GRADKERN_API void gradkern_alloc_start_recording() {
  const std::lock_guard<std::mutex> lock(record_mutex);
  timeline.clear();
  timeline.reserve(kTimelineCapacity);
  events_per_sample = 1;
  events_in_last_sample = 0;
  record_start = std::chrono::steady_clock::now();
  peak_bytes = 0;
  record_locked(live_bytes.load(std::memory_order_relaxed));
  recording.store(true, std::memory_order_relaxed);
}

GRADKERN_API void gradkern_alloc_stop_recording() { recording.store(false, std::memory_order_relaxed); }

// The largest live bytes since recording began or since the last call of this function.
GRADKERN_API int64_t gradkern_alloc_take_peak() {
  const std::lock_guard<std::mutex> lock(record_mutex);
  const int64_t taken = peak_bytes;
  peak_bytes = live_bytes.load(std::memory_order_relaxed);
  return taken;
}

// Copies at most `capacity` samples and returns how many there are.
GRADKERN_API int64_t gradkern_alloc_timeline(int64_t* time_ns, int64_t* live, int64_t capacity) {
  const std::lock_guard<std::mutex> lock(record_mutex);
  const auto count = std::min(static_cast<int64_t>(timeline.size()), capacity);
  for (int64_t i = 0; i < count; ++i) {
    time_ns[i] = timeline[static_cast<size_t>(i)].time_ns;
    live[i] = timeline[static_cast<size_t>(i)].live_bytes;
  }
  return static_cast<int64_t>(timeline.size());
}

// Refuses allocations that would raise the live bytes above `nbytes`; a negative value lifts the cap.
GRADKERN_API void gradkern_alloc_set_cap(int64_t nbytes) {
  cap_bytes.store(nbytes < 0 ? kNoCap : nbytes, std::memory_order_relaxed);
}

GRADKERN_API int64_t gradkern_alloc_refused_count() { return refused_count.load(std::memory_order_relaxed); }
