// Lets a PyTorch without CUDA hold tensors that say they are on a GPU, and differentiate: for
// tests/fake_gpu.py. There is one device with one stream, and nothing ever runs on it.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {

struct OneStream : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Stream getStream(Device) const noexcept { return the(); }
  Stream getNewStream(Device, int) const override { return the(); }
  Stream exchangeStream(Stream) const noexcept { return the(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  static Stream the() { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)); }
};

C10_REGISTER_GUARD_IMPL(CUDA, OneStream)

}  // namespace c10::impl

namespace at {

struct FakeHooks : CUDAHooksInterface {
  explicit FakeHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};

C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, FakeHooks)

}  // namespace at
