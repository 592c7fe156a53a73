// A process group of the accelerator of threads: gloo's collectives on a stream of their own, as NCCL's are.
//
// A collective is put down on the group's stream behind what the current stream has been given; its tensors are kept by
// the Work until somebody waits, which makes the current stream wait and not the host.
#include <torch/extension.h>

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include "memory.h"

namespace threads {

using c10::intrusive_ptr;
using c10d::Backend;
using c10d::Work;
using Tensors = std::vector<at::Tensor>;

at::Tensor on_cpu(const at::Tensor& tensor);
extern std::atomic<int64_t> next_stream;

Tensors all_on_cpu(const Tensors& tensors) {
    Tensors found;
    for (const at::Tensor& tensor : tensors) found.push_back(on_cpu(tensor));
    return found;
}

std::vector<Tensors> all_on_cpu(const std::vector<Tensors>& lists) {
    std::vector<Tensors> found;
    for (const Tensors& list : lists) found.push_back(all_on_cpu(list));
    return found;
}

struct Pending final : Work {
    Pending(int rank, c10d::OpType type, Point done, Tensors kept, Tensors results)
        : Work(rank, type), done_(done), kept_(std::move(kept)), results_(std::move(results)) {}
    bool isCompleted() override { return Scheduler::instance().query(done_); }
    bool isSuccess() const override { return true; }
    void synchronize() override { wait(kNoTimeout); }
    bool wait(std::chrono::milliseconds) override {
        Item item{"", nullptr};
        item.waits = true;
        item.until = done_;
        Scheduler::instance().put(current_stream(done_.stream.first), std::move(item));
        kept_.clear();
        return true;
    }
    Tensors result() override { return results_; }
    intrusive_ptr<c10::ivalue::Future> getFuture() override {
        auto future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
        wait(kNoTimeout);
        future->markCompleted(c10::IValue(results_));
        return future;
    }

 private:
    Point done_;
    Tensors kept_, results_;
};

// A message of gloo's under way: gloo itself says that one is complete only to who waits, so that a thread does.
struct Message final : Work {
    static intrusive_ptr<Work> watched(intrusive_ptr<Work> inner) {
        auto made = c10::make_intrusive<Message>();
        std::thread([made, inner = std::move(inner)] {
            try {
                inner->wait();
                made->finish();
            } catch (...) {
                made->finish(std::current_exception());
            }
        }).detach();
        return made;
    }
};

class Group final : public Backend {
 public:
    Group(intrusive_ptr<Backend> gloo, int rank, int size) : Backend(rank, size), gloo_(std::move(gloo)) {}

    const std::string getBackendName() const override { return "threads"; }

    intrusive_ptr<Work> broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
        return put("broadcast", c10d::OpType::BROADCAST, tensors, tensors,
                   [this, cpu = all_on_cpu(tensors), options]() mutable { return gloo_->broadcast(cpu, options); });
    }
    intrusive_ptr<Work> allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
        return put("allreduce", c10d::OpType::ALLREDUCE, tensors, tensors, summed(all_on_cpu(tensors), options));
    }
    intrusive_ptr<Work> allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
        intrusive_ptr<Work> last;
        for (at::Tensor& tensor : tensors) {
            Tensors one{tensor};
            last = allreduce(one, options);
        }
        return last;
    }
    intrusive_ptr<Work> reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
        return put("reduce", c10d::OpType::REDUCE, tensors, tensors,
                   [this, cpu = all_on_cpu(tensors), options]() mutable { return gloo_->reduce(cpu, options); });
    }
    intrusive_ptr<Work> allgather(std::vector<Tensors>& outputs, Tensors& inputs,
                                  const c10d::AllgatherOptions& options) override {
        Tensors kept = inputs;
        kept.insert(kept.end(), outputs[0].begin(), outputs[0].end());
        return put("allgather", c10d::OpType::ALLGATHER, kept, outputs[0],
                   [this, to = all_on_cpu(outputs), from = all_on_cpu(inputs), options]() mutable {
                       return gloo_->allgather(to, from, options);
                   });
    }
    intrusive_ptr<Work> _allgather_base(at::Tensor& output, at::Tensor& input,
                                        const c10d::AllgatherOptions& options) override {
        return put("allgather", c10d::OpType::_ALLGATHER_BASE, {output, input}, {output},
                   [this, to = on_cpu(output), from = on_cpu(input), options]() mutable {
                       std::vector<Tensors> pieces{to.chunk(getSize())};
                       Tensors own{from.view(-1)};
                       for (at::Tensor& piece : pieces[0]) piece = piece.view(-1);
                       return gloo_->allgather(pieces, own, options);
                   });
    }
    intrusive_ptr<Work> _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                             const c10d::ReduceScatterOptions& options) override {
        // gloo's own differs between versions: the sum of all, of which the own piece is kept.
        const auto whole = std::make_shared<at::Tensor>();
        c10d::AllreduceOptions sum;
        sum.reduceOp = options.reduceOp;
        return put(
            "reduce_scatter", c10d::OpType::_REDUCE_SCATTER_BASE, {output, input}, {output},
            [this, from = on_cpu(input), whole, sum]() {
                *whole = from.clone();
                return summed({*whole}, sum)();
            },
            [this, to = on_cpu(output), whole, is_average = options.reduceOp == c10d::ReduceOp::AVG]() {
                if (is_average) whole->div_(getSize());
                to.view(-1).copy_(whole->view(-1).chunk(getSize())[getRank()]);
            });
    }
    intrusive_ptr<Work> gather(std::vector<Tensors>& outputs, Tensors& inputs,
                               const c10d::GatherOptions& options) override {
        Tensors kept = inputs;
        if (!outputs.empty()) kept.insert(kept.end(), outputs[0].begin(), outputs[0].end());
        return put("gather", c10d::OpType::GATHER, kept, kept,
                   [this, to = all_on_cpu(outputs), from = all_on_cpu(inputs), options]() mutable {
                       return gloo_->gather(to, from, options);
                   });
    }
    intrusive_ptr<Work> scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                                const c10d::ScatterOptions& options) override {
        Tensors kept = outputs;
        if (!inputs.empty()) kept.insert(kept.end(), inputs[0].begin(), inputs[0].end());
        return put("scatter", c10d::OpType::SCATTER, kept, outputs,
                   [this, to = all_on_cpu(outputs), from = all_on_cpu(inputs), options]() mutable {
                       return gloo_->scatter(to, from, options);
                   });
    }
    intrusive_ptr<Work> alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& to_sizes,
                                      std::vector<int64_t>& from_sizes, const c10d::AllToAllOptions& options) override {
        return put("alltoall", c10d::OpType::ALLTOALL_BASE, {output, input}, {output},
                   [this, to = on_cpu(output), from = on_cpu(input), to_sizes, from_sizes, options]() mutable {
                       return gloo_->alltoall_base(to, from, to_sizes, from_sizes, options);
                   });
    }
    intrusive_ptr<Work> send(Tensors& tensors, int rank, int tag) override {
        return put("send", c10d::OpType::SEND, tensors, tensors,
                   [this, cpu = all_on_cpu(tensors), rank, tag]() mutable {
                       return Message::watched(gloo_->send(cpu, rank, tag));
                   });
    }
    intrusive_ptr<Work> recv(Tensors& tensors, int rank, int tag) override {
        return put("recv", c10d::OpType::RECV, tensors, tensors,
                   [this, cpu = all_on_cpu(tensors), rank, tag]() mutable {
                       return Message::watched(gloo_->recv(cpu, rank, tag));
                   });
    }
    intrusive_ptr<Work> barrier(const c10d::BarrierOptions&) override {
        Tensors one{at::zeros({1}, at::TensorOptions().device(at::kPrivateUse1))};
        auto work = allreduce(one, c10d::AllreduceOptions());
        Scheduler::instance().synchronize(Scheduler::instance().point_of(stream()));
        return work;
    }

 private:
    StreamKey stream() {
        if (stream_ == 0) stream_ = next_stream++;
        return {current_device(), stream_};
    }

    std::function<intrusive_ptr<Work>()> summed(Tensors cpu, c10d::AllreduceOptions options) {
        if (options.reduceOp == c10d::ReduceOp::AVG) options.reduceOp = c10d::ReduceOp::SUM;
        return [this, cpu = std::move(cpu), options]() mutable { return gloo_->allreduce(cpu, options); };
    }

    intrusive_ptr<Work> put(const char* name, c10d::OpType type, Tensors kept, Tensors results,
                            std::function<intrusive_ptr<Work>()> start, std::function<void()> end = nullptr) {
        for (const at::Tensor& tensor : kept)
            TORCH_CHECK(tensor.device().type() == c10::DeviceType::PrivateUse1, name, ": a tensor is on ",
                        tensor.device());
        Scheduler& scheduler = Scheduler::instance();
        const StreamKey own = stream();
        // Messages only start when somebody waits: a rank may post a receive before it sends what the other waits for.
        const bool is_message = type == c10d::OpType::SEND || type == c10d::OpType::RECV;
        const auto put_down = [&](Item item) {
            return is_message ? scheduler.put_only(own, std::move(item)) : scheduler.put(own, std::move(item));
        };
        Item wait{"", nullptr};
        wait.waits = true;
        wait.until = scheduler.point_of(current_stream(own.first));
        put_down(std::move(wait));
        const auto work = std::make_shared<intrusive_ptr<Work>>();
        Item item{name, [work, start = std::move(start)] { *work = start(); }};
        item.is_done = [work] { return (*work)->isCompleted(); };
        put_down(std::move(item));
        const Point done = put_down({"", [work, end = std::move(end)] {
                                         if ((*work)->exception()) std::rethrow_exception((*work)->exception());
                                         if (end) end();
                                     }});
        return c10::make_intrusive<Pending>(getRank(), type, done, std::move(kept), std::move(results));
    }

    intrusive_ptr<Backend> gloo_;
    int64_t stream_ = 0;
};

void register_group(pybind11::module_& m) {
    pybind11::class_<Group, Backend, intrusive_ptr<Group>>(m, "Group");
    m.def("make_group", [](const intrusive_ptr<Backend>& gloo, int rank, int size) {
        return c10::make_intrusive<Group>(gloo, rank, size);
    });
}

}  // namespace threads
