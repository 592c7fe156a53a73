// An accelerator for tests, under torch's PrivateUse1: host memory, streams that are queues (scheduler.h), the CPU's
// kernels. An op's shapes are known at once, by its meta kernel; its work is put down on the current stream.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include "memory.h"

namespace threads {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IValue;

constexpr DeviceType TYPE = DeviceType::PrivateUse1;
constexpr int DEVICES = 8;

thread_local int device_of_thread = 0;
thread_local std::array<int64_t, DEVICES> stream_of_thread{};
std::atomic<int64_t> next_stream{1};

int current_device() { return device_of_thread; }
StreamKey current_stream(int device) { return {device, stream_of_thread[device]}; }
StreamKey current_stream() { return current_stream(current_device()); }
StreamKey key_of(const c10::Stream& stream) { return {stream.device_index(), stream.id()}; }

// --- devices, streams, events ---------------------------------------------------------------------------------------

struct Event {
    Point point;
    bool is_recorded = false;
    std::shared_ptr<double> at = std::make_shared<double>(0);  // milliseconds
};

double now_ms() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
    DeviceType type() const override { return TYPE; }
    Device exchangeDevice(Device device) const override {
        const Device before = getDevice();
        setDevice(device);
        return before;
    }
    Device getDevice() const override { return Device(TYPE, static_cast<DeviceIndex>(device_of_thread)); }
    void setDevice(Device device) const override {
        if (device.has_index()) device_of_thread = device.index();
    }
    void uncheckedSetDevice(Device device) const noexcept override { setDevice(device); }
    c10::Stream stream_of(int device, int64_t id) const {
        return c10::Stream(c10::Stream::UNSAFE, Device(TYPE, static_cast<DeviceIndex>(device)), id);
    }
    static int index_of(Device device) { return device.has_index() ? device.index() : device_of_thread; }
    c10::Stream getStream(Device device) const override {
        return stream_of(index_of(device), stream_of_thread[index_of(device)]);
    }
    c10::Stream getDefaultStream(Device device) const override { return stream_of(index_of(device), 0); }
    c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
    c10::Stream getNewStream(Device device, int) const override { return stream_of(index_of(device), next_stream++); }
    c10::Stream exchangeStream(c10::Stream stream) const override {
        const int device = stream.device_index();
        const c10::Stream before = stream_of(device, stream_of_thread[device]);
        stream_of_thread[device] = stream.id();
        return before;
    }
    void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
    void record(void** event, const c10::Stream& stream, const DeviceIndex, const c10::EventFlag) const override {
        if (*event == nullptr) *event = new Event;
        Event& recorded = *static_cast<Event*>(*event);
        recorded.at = std::make_shared<double>(0);
        recorded.is_recorded = true;
        recorded.point = Scheduler::instance().put(key_of(stream), {"", [at = recorded.at] { *at = now_ms(); }});
    }
    void block(void* event, const c10::Stream& stream) const override {
        if (event == nullptr || !static_cast<Event*>(event)->is_recorded) return;
        Item wait{"", nullptr};
        wait.waits = true;
        wait.until = static_cast<Event*>(event)->point;
        Scheduler::instance().put(key_of(stream), std::move(wait));
    }
    bool queryEvent(void* event) const override {
        return event == nullptr || !static_cast<Event*>(event)->is_recorded ||
               Scheduler::instance().query(static_cast<Event*>(event)->point);
    }
    void synchronizeEvent(void* event) const override {
        if (event != nullptr && static_cast<Event*>(event)->is_recorded)
            Scheduler::instance().synchronize(static_cast<Event*>(event)->point);
    }
    DeviceIndex deviceCount() const noexcept override { return DEVICES; }
    bool queryStream(const c10::Stream& stream) const override {
        return Scheduler::instance().query(Scheduler::instance().point_of(key_of(stream)));
    }
    void synchronizeStream(const c10::Stream& stream) const override {
        Scheduler::instance().synchronize(Scheduler::instance().point_of(key_of(stream)));
    }
    void synchronizeDevice(const DeviceIndex device) const override {
        Scheduler::instance().synchronize_device(device);
    }
    void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
        Memory::instance().record(data.get(), key_of(stream));
    }
    double elapsedTime(void* first, void* second, const DeviceIndex) const override {
        return *static_cast<Event*>(second)->at - *static_cast<Event*>(first)->at;
    }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// --- random numbers -------------------------------------------------------------------------------------------------

// A seed and how many random ops were put down since: an op draws from a CPU generator that both of them seed, whenever
// it runs.
struct Generator final : c10::GeneratorImpl {
    explicit Generator(DeviceIndex device)
        : GeneratorImpl(Device(TYPE, device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
    void set_current_seed(uint64_t seed) override { seed_ = seed, offset_ = 0; }
    void set_offset(uint64_t offset) override { offset_ = offset; }
    uint64_t get_offset() const override { return offset_; }
    uint64_t current_seed() const override { return seed_; }
    uint64_t seed() override {
        set_current_seed(std::random_device{}());
        return seed_;
    }
    void set_state(const c10::TensorImpl& state) override {
        const auto* words = static_cast<const uint64_t*>(state.data());
        seed_ = words[0], offset_ = words[1];
    }
    c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
        at::Tensor state = at::empty({16}, at::kByte);
        auto* words = reinterpret_cast<uint64_t*>(state.mutable_data_ptr<uint8_t>());
        words[0] = seed_, words[1] = offset_;
        return state.getIntrusivePtr();
    }
    Generator* clone_impl() const override {
        auto* copy = new Generator(device().index());
        copy->seed_ = seed_, copy->offset_ = offset_;
        return copy;
    }
    uint64_t draw() { return seed_ * 0x9e3779b97f4a7c15ull + ++offset_; }

 private:
    uint64_t seed_ = c10::default_rng_seed_val, offset_ = 0;
};

at::Generator& default_generator(DeviceIndex device) {
    static std::array<at::Generator, DEVICES>* all = [] {
        auto* made = new std::array<at::Generator, DEVICES>;
        for (int i = 0; i < DEVICES; ++i) (*made)[i] = at::make_generator<Generator>(static_cast<DeviceIndex>(i));
        return made;
    }();
    return (*all)[device < 0 ? current_device() : device];
}

struct Hooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    DeviceIndex deviceCount() const override { return DEVICES; }
    void setCurrentDevice(DeviceIndex device) const override { device_of_thread = device; }
    DeviceIndex getCurrentDevice() const override { return static_cast<DeviceIndex>(device_of_thread); }
    DeviceIndex exchangeDevice(DeviceIndex device) const override {
        return static_cast<DeviceIndex>(std::exchange(device_of_thread, device));
    }
    DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
    bool isPinnedPtr(const void* data) const override { return Pinned::instance().holds(data); }
    c10::Allocator* getPinnedMemoryAllocator() const override { return &Pinned::instance(); }
    Device getDeviceFromPtr(void*) const override { return Device(TYPE, static_cast<DeviceIndex>(device_of_thread)); }
    const at::Generator& getDefaultGenerator(DeviceIndex device) const override { return default_generator(device); }
    at::Generator getNewGenerator(DeviceIndex device) const override {
        return at::make_generator<Generator>(device < 0 ? getCurrentDevice() : device);
    }
    void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
        c10::StorageImpl* impl = storage.unsafeGetStorageImpl();
        c10::DeviceGuard guard(storage.device());
        c10::DataPtr fresh = Memory::instance().allocate(nbytes);
        const size_t kept = std::min(nbytes, impl->nbytes());
        void *to = fresh.get(), *from = impl->mutable_data();
        if (kept > 0) Scheduler::instance().put(current_stream(), {"resize", [=] { std::memcpy(to, from, kept); }});
        impl->set_data_ptr_noswap(std::move(fresh));
        impl->set_nbytes(nbytes);
    }
};

// --- ops ------------------------------------------------------------------------------------------------------------

bool is_ours(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == TYPE; }

// The same memory as a CPU tensor. It keeps nothing alive: that memory lives is what is tested.
at::Tensor on_cpu(const at::Tensor& tensor) {
    if (!is_ours(tensor)) return tensor;
    return at::from_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(),
                         at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU));
}

at::Tensor on_meta(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kMeta));
}

// Every tensor of a value by `map`.
IValue mapped(const IValue& value, const std::function<at::Tensor(const at::Tensor&)>& map, Device device) {
    if (value.isTensor()) return map(value.toTensor());
    if (value.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(map(tensor));
        return list;
    }
    if (value.isOptionalTensorList()) {
        c10::List<std::optional<at::Tensor>> list;
        for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
            list.push_back(tensor.has_value() ? std::optional(map(*tensor)) : std::nullopt);
        return list;
    }
    if (value.isDevice()) return device;
    return value;
}

void each_tensor(const IValue& value, const std::function<void(const at::Tensor&)>& see) {
    mapped(value, [&](const at::Tensor& tensor) { return see(tensor), tensor; }, at::kCPU);
}

// The CPU's kernels, whatever mode the calling thread is in.
struct PlainKernels {
    c10::impl::ExcludeDispatchKeyGuard no_modes{
        c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset |
        c10::DispatchKeySet({c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::Python,
                             c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                             c10::DispatchKey::FuncTorchDynamicLayerBackMode})};
};

void call_with_seed(const c10::OperatorHandle& op, torch::jit::Stack& stack, std::optional<uint64_t> seed) {
    PlainKernels plain;
    if (!seed.has_value()) return op.callBoxed(stack);
    at::Generator cpu = at::detail::getDefaultCPUGenerator();
    at::Tensor before;
    {
        std::lock_guard lock(cpu.mutex());
        before = cpu.get_state();
        cpu.set_current_seed(*seed);
    }
    op.callBoxed(stack);
    std::lock_guard lock(cpu.mutex());
    cpu.set_state(before);
}

std::optional<uint64_t> seed_for(const c10::OperatorHandle& op, torch::jit::Stack& arguments) {
    bool is_random = op.hasTag(at::Tag::nondeterministic_seeded);
    at::Generator from = default_generator(-1);
    for (IValue& value : arguments) {
        if (!value.isGenerator()) continue;
        is_random = true;
        if (value.toGenerator().device().type() == TYPE) from = value.toGenerator(), value = IValue();
    }
    if (!is_random) return std::nullopt;
    std::lock_guard lock(from.mutex());
    return static_cast<Generator*>(from.unsafeGetGeneratorImpl())->draw();
}

// Results of the CPU, as tensors of the device: where shapes depend on data the host has to wait.
void run_at_once(const c10::OperatorHandle& op, torch::jit::Stack* stack, size_t count, Device device) {
    Scheduler& scheduler = Scheduler::instance();
    scheduler.synchronize(scheduler.point_of(current_stream(device.index())));
    torch::jit::Stack arguments = torch::jit::pop(*stack, count);
    const torch::jit::Stack originals = arguments;
    for (IValue& value : arguments) value = mapped(value, on_cpu, at::kCPU);
    const auto seed = seed_for(op, arguments);
    call_with_seed(op, arguments, seed);
    const auto& returns = op.schema().returns();
    size_t written = 0;
    for (size_t i = 0; i < returns.size(); ++i) {
        if (returns[i].alias_info() != nullptr && returns[i].alias_info()->isWrite()) {
            for (; written < originals.size(); ++written) {
                const auto* info = op.schema().arguments()[written].alias_info();
                if (info != nullptr && info->isWrite()) break;
            }
            stack->push_back(originals[written++]);
            continue;
        }
        stack->push_back(mapped(
            arguments[i], [&](const at::Tensor& result) { return result.defined() ? result.to(device) : result; },
            device));
    }
}

std::atomic<bool> says_what_waits{getenv("THREADS_SAY_WAITS") != nullptr};

void put_down(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const auto& schema = op.schema();
    const size_t count = schema.arguments().size();
    Device device(TYPE, static_cast<DeviceIndex>(current_device()));
    for (const IValue& value : torch::jit::last(*stack, count)) {
        if (value.isDevice() && value.toDevice().type() == TYPE) device = value.toDevice();
        each_tensor(value, [&](const at::Tensor& tensor) {
            if (is_ours(tensor)) device = tensor.device();
        });
    }
    if (!device.has_index()) device.set_index(static_cast<DeviceIndex>(current_device()));
    c10::DeviceGuard guard(device);

    bool returns_tensors = true;
    for (const auto& result : schema.returns()) {
        const auto kind = result.type()->kind();
        returns_tensors = returns_tensors && (kind == c10::TypeKind::TensorType || kind == c10::TypeKind::ListType);
        TORCH_CHECK(result.alias_info() == nullptr || result.alias_info()->isWrite(), schema.operator_name(),
                    " makes a view, which the device of threads has not");
    }
    if (!returns_tensors || op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape))
        return run_at_once(op, stack, count, device);

    // Shapes, by the meta kernel, where anything is new or an `out` may be resized.
    torch::jit::Stack metas;
    bool asks = false;
    for (const auto& result : schema.returns()) asks = asks || result.alias_info() == nullptr;
    for (const auto& argument : schema.arguments())
        asks = asks || (argument.is_out() && argument.alias_info() != nullptr);
    if (asks) {
        for (const IValue& value : torch::jit::last(*stack, count)) {
            metas.push_back(value.isGenerator() ? IValue() : mapped(value, on_meta, at::kMeta));
        }
        torch::jit::Stack before = metas;
        try {
            PlainKernels plain;
            op.callBoxed(metas);
        } catch (const c10::NotImplementedError&) {
            if (says_what_waits) fprintf(stderr, "no shapes of %s\n", schema.name().c_str());
            return run_at_once(op, stack, count, device);
        }
        const auto arguments = torch::jit::last(*stack, count);
        // Meta kernels speak for GPUs: the CPU's keeps means and deviations in the inputs' dtype.
        if (schema.name() == "aten::native_layer_norm" || schema.name() == "aten::native_group_norm") {
            const auto dtype = arguments[0].toTensor().scalar_type();
            const size_t weight = schema.name() == "aten::native_layer_norm" ? 2 : 1;
            const bool is_mixed = arguments[weight].isTensor() && arguments[weight].toTensor().scalar_type() != dtype;
            for (size_t i = 1; i < 3; ++i)
                if (!is_mixed) metas[i] = metas[i].toTensor().to(dtype);
        }
        for (size_t i = 0; i < count; ++i) {
            if (!schema.arguments()[i].is_out() || !before[i].isTensor()) continue;
            const at::Tensor &found = before[i].toTensor(), out = arguments[i].toTensor();
            if (out.sizes() != found.sizes()) out.resize_(found.sizes());
        }
    }

    torch::jit::Stack originals = torch::jit::pop(*stack, count);
    torch::jit::Stack cpu;
    for (const IValue& value : originals) {
        // A number of the host's is read now.
        cpu.push_back(mapped(
            value,
            [](const at::Tensor& tensor) {
                return !tensor.defined() || is_ours(tensor) ? on_cpu(tensor) : tensor.clone();
            },
            at::kCPU));
    }
    const auto seed = seed_for(op, cpu);

    std::vector<IValue> results;
    torch::jit::Stack targets;  // what is new, as the CPU sees it
    size_t written = 0;
    for (size_t i = 0; i < schema.returns().size(); ++i) {
        if (schema.returns()[i].alias_info() != nullptr) {
            for (; written < count; ++written) {
                const auto* info = schema.arguments()[written].alias_info();
                if (info != nullptr && info->isWrite()) break;
            }
            results.push_back(originals[written++]);
            targets.emplace_back();
            continue;
        }
        results.push_back(mapped(
            metas[i],
            [&](const at::Tensor& meta) {
                if (!meta.defined()) return meta;
                return at::empty_strided(meta.sizes(), meta.strides(), meta.options().device(device));
            },
            device));
        targets.push_back(mapped(results.back(), on_cpu, at::kCPU));
    }
    Scheduler::instance().put(current_stream(device.index()),
                              {schema.name(), [op, cpu, targets, seed]() mutable {
                                   try {
                                       call_with_seed(op, cpu, seed);
                                   } catch (const std::exception& error) {
                                       TORCH_CHECK(false, op.schema().operator_name(), ", run late: ", error.what());
                                   }
                                   PlainKernels plain;
                                   for (size_t i = 0; i < targets.size(); ++i) {
                                       if (targets[i].isNone()) continue;
                                       std::vector<at::Tensor> made, wanted;
                                       each_tensor(cpu[i], [&](const at::Tensor& tensor) { made.push_back(tensor); });
                                       each_tensor(targets[i],
                                                   [&](const at::Tensor& tensor) { wanted.push_back(tensor); });
                                       for (size_t j = 0; j < wanted.size(); ++j)
                                           if (wanted[j].defined() && made[j].defined()) wanted[j].copy_(made[j]);
                                   }
                               }});
    for (IValue& result : results) stack->push_back(std::move(result));
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    std::optional<pybind11::gil_scoped_release>
        released;  // work that runs may need another process, whose turn needs ours
    if (Py_IsInitialized() && PyGILState_Check()) released.emplace();
    put_down(op, stack);
}

at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
    const Device where = device.value_or(Device(TYPE));
    c10::DeviceGuard guard(where.has_index() ? where : Device(TYPE, static_cast<DeviceIndex>(current_device())));
    return at::detail::empty_strided_generic(sizes, strides, &Memory::instance(),
                                             c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                             c10::dtype_or_default(dtype));
}

at::Tensor empty(c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
    const Device where = device.value_or(Device(TYPE));
    c10::DeviceGuard guard(where.has_index() ? where : Device(TYPE, static_cast<DeviceIndex>(current_device())));
    return at::detail::empty_generic(sizes, &Memory::instance(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                     c10::dtype_or_default(dtype), format);
}

// As cudaMemcpyAsync has it: pageable memory is read before the call returns and written before it returns; pinned
// memory when its turn comes, where the caller does not wait.
at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
    std::optional<pybind11::gil_scoped_release> released;
    if (Py_IsInitialized() && PyGILState_Check()) released.emplace();
    const Device device = is_ours(to) ? to.device() : from.device();
    c10::DeviceGuard guard(device);
    const bool crosses = !is_ours(from) || !is_ours(to);
    at::Tensor source = on_cpu(from), target = on_cpu(to);
    const bool pinned = crosses && Pinned::instance().holds((is_ours(from) ? to : from).const_data_ptr());
    if (crosses && !is_ours(from) && !pinned) source = from.clone();
    Scheduler& scheduler = Scheduler::instance();
    const Point done = scheduler.put(
        current_stream(device.index()),
        {crosses ? (is_ours(to) ? "copy to device" : "copy to host") : "copy", [source, target]() mutable {
             PlainKernels plain;
             target.expand(target.sizes()).copy_(source.expand(target.sizes()));
         }});
    if (crosses && !(non_blocking && pinned) && (!is_ours(to) || !non_blocking)) scheduler.synchronize(done);
    return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
    if (from.sizes() != to.sizes()) to.resize_(from.sizes());
    return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& tensor) {
    Scheduler& scheduler = Scheduler::instance();
    scheduler.synchronize(scheduler.point_of(current_stream(tensor.device().index())));
    return on_cpu(tensor).item();
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef sizes, std::optional<at::MemoryFormat>) {
    const auto shape = C10_AS_INTARRAYREF_SLOW(sizes);
    if (self.sizes() == shape) return self;
    at::TensorImpl* impl = self.unsafeGetTensorImpl();
    impl->set_sizes_contiguous(shape);
    const size_t needed = (impl->storage_offset() + impl->numel()) * impl->itemsize();
    if (impl->storage().nbytes() < needed)
        at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(impl->storage(), needed);
    return self;
}

void record_stream(at::Tensor& self, c10::Stream stream) {
    Memory::instance().record(self.storage().mutable_data(), key_of(stream));
}

int64_t sdp_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double,
                   bool, std::optional<double>, bool) {
    return 0;  // plain products and softmax
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    m.impl("empty.memory_format", &empty);
    m.impl("empty_strided", &empty_strided);
    m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
    m.impl("view", TORCH_FN(at::native::view));
    m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
    m.impl("unfold", TORCH_FN(at::native::unfold));
    m.impl("resize_", &resize);
    m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
    m.impl("set_.source_Storage", TORCH_FN(at::native::set_));
    m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
    m.impl("_copy_from", &copy_from);
    m.impl("_copy_from_and_resize", &copy_from_and_resize);
    m.impl("_local_scalar_dense", &local_scalar);
    m.impl("record_stream", &record_stream);
    m.impl("_fused_sdp_choice", &sdp_choice);
    // torch would make these of others, whose means the CPU's backward kernels do not take.
    m.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
    m.impl("native_group_norm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

void register_group(pybind11::module_& m);

}  // namespace threads

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    using namespace threads;
    c10::SetAllocator(TYPE, &Memory::instance());
    static Hooks hooks;
    at::RegisterPrivateUse1HooksInterface(&hooks);
    const auto unlocked = pybind11::call_guard<pybind11::gil_scoped_release>();
    m.def("seed", [](uint64_t seed) { Scheduler::instance().seed(seed); }, unlocked);
    m.def("synchronize", [](int device) { Scheduler::instance().synchronize_device(device); }, unlocked);
    m.def("syncs", [] { return Scheduler::instance().syncs(); });
    m.def("keep_trace", [](bool keep) { Scheduler::instance().keep_trace(keep); }, unlocked);
    m.def("take_trace", [] {
        std::vector<std::tuple<std::string, int64_t, uint64_t, uint64_t>> rows;
        for (const Traced& row : Scheduler::instance().take_trace())
            rows.emplace_back(row.name, row.stream, row.queued_at, row.run_at);
        return rows;
    });
    m.def("memory", [] {
        const Memory& memory = Memory::instance();
        return std::make_tuple(memory.live(), memory.peak(), memory.reserved());
    });
    m.def("reset_peak", [] { Memory::instance().reset_peak(); });
    m.def("device_count", [] { return DEVICES; });
    m.def("current_device", [] { return current_device(); });
    m.def("set_device", [](int device) { device_of_thread = device; });
    m.def("default_generator", [](int device) { return default_generator(static_cast<DeviceIndex>(device)); });
    register_group(m);
}
