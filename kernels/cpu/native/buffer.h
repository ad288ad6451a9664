// Scratch memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace arriero {

// Memory that grows and is kept, in whole cache lines; large pieces ask for large pages.
class Buffer {
  public:
    char* room(int64_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + kPage - 1) / kPage * kPage;
            data_ = static_cast<char*>(std::aligned_alloc(kPage, size_t(size_)));
            if (data_ == nullptr) {
                size_ = 0;
                throw std::bad_alloc();
            }
            advise_large(data_, size_);
        }
        return data_;
    }
    ~Buffer() { std::free(data_); }
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    static void advise_large(void* data, int64_t bytes);

  private:
    static constexpr int64_t kPage = 1 << 16;
    char* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace arriero
