// The KDA recurrence and the short convolution on the CPU, with their gradients.
//
// Recurrence: one job a (row, head), its state in the first-level cache.
// q, k, v, g: [B, T, H, D]; beta: [B, T, H]; state S [key, value], zero at the start. For each token
//
//     S <- diag(exp(g)) S;   u = beta (v - S^T k);   S <- S + k u^T;   o = S^T q
//
// The forward pass keeps the state at every 16th token; the gradient computes those between again.
#include <torch/extension.h>
#include <cmath>
#include <vector>

constexpr int CHUNK = 16;

// One token from S to S, with the decayed state S' kept in `decayed` where the gradient needs it.
template <int D>
static void step(float (*S)[D], const float* q, const float* k, const float* v, const float* g, float beta, float* u, float* o,
                 float (*decayed)[D]) {
    float r[D] = {}, out[D] = {};
    for (int i = 0; i < D; i++) {
        float a = std::exp(g[i]);
        for (int j = 0; j < D; j++) {
            S[i][j] *= a;
            r[j] += S[i][j] * k[i];
        }
        if (decayed)
            for (int j = 0; j < D; j++) decayed[i][j] = S[i][j];
    }
    for (int j = 0; j < D; j++) u[j] = beta * (v[j] - r[j]);
    for (int i = 0; i < D; i++)
        for (int j = 0; j < D; j++) {
            S[i][j] += k[i] * u[j];
            out[j] += S[i][j] * q[i];
        }
    for (int j = 0; j < D; j++) o[j] = out[j];
}

template <int D>
static void forward_job(int64_t T, int64_t stride, int64_t heads, const float* q, const float* k, const float* v, const float* g,
                        const float* beta, float* o, float* kept) {
    alignas(64) float S[D][D] = {};
    float u[D];
    for (int64_t t = 0; t < T; t++) {
        if (t % CHUNK == 0) memcpy(kept + t / CHUNK * D * D, S, sizeof S);
        int64_t at = t * stride;
        step<D>(S, q + at, k + at, v + at, g + at, beta[t * heads], u, o + at, nullptr);
    }
}

template <int D>
static void backward_job(int64_t T, int64_t stride, int64_t heads, const float* q, const float* k, const float* v, const float* g,
                         const float* beta, const float* kept, const float* grad, float* dq, float* dk, float* dv, float* dg,
                         float* dbeta) {
    using Matrix = float[D][D];
    std::vector<float> space((2 * CHUNK) * D * D + 64 / sizeof(float));
    Matrix* after = reinterpret_cast<Matrix*>(space.data());
    Matrix* decayed = after + CHUNK;
    alignas(64) float S[D][D], dS[D][D] = {};
    float u[CHUNK][D], o[D];
    for (int64_t start = (T - 1) / CHUNK * CHUNK; start >= 0; start -= CHUNK) {
        int64_t end = std::min(T, start + CHUNK);
        memcpy(S, kept + start / CHUNK * D * D, sizeof S);
        for (int64_t t = start; t < end; t++) {
            int64_t at = t * stride;
            step<D>(S, q + at, k + at, v + at, g + at, beta[t * heads], u[t - start], o, decayed[t - start]);
            memcpy(after[t - start], S, sizeof S);
        }
        for (int64_t t = end - 1; t >= start; t--) {
            int64_t at = t * stride, c = t - start;
            const float *qt = q + at, *kt = k + at, *gt = g + at, *d_o = grad + at;
            float b = beta[t * heads], du[D] = {}, dr[D], db = 0;
            for (int i = 0; i < D; i++) {
                float x = 0, y = 0;
                for (int j = 0; j < D; j++) {
                    dS[i][j] += qt[i] * d_o[j];
                    x += after[c][i][j] * d_o[j];
                    y += dS[i][j] * u[c][j];
                    du[j] += dS[i][j] * kt[i];
                }
                dq[at + i] = x;
                dk[at + i] = y;
            }
            for (int j = 0; j < D; j++) {
                db += du[j] * u[c][j];
                dv[at + j] = b * du[j];
                dr[j] = -b * du[j];
            }
            dbeta[t * heads] = b > 0 ? db / b : 0;
            for (int i = 0; i < D; i++) {
                float x = 0, y = 0, a = std::exp(gt[i]);
                for (int j = 0; j < D; j++) {
                    x += decayed[c][i][j] * dr[j];
                    float d = dS[i][j] + kt[i] * dr[j];
                    y += d * decayed[c][i][j];
                    dS[i][j] = a * d;
                }
                dk[at + i] += x;
                dg[at + i] = y;
            }
        }
    }
}

template <typename Job>
static void each(int64_t jobs, Job job) {
    at::parallel_for(0, jobs, 1, [&](int64_t a, int64_t b) {
        for (int64_t i = a; i < b; i++) job(i);
    });
}

#define WIDTHS(D, call) \
    if ((D) == 32) call(32) else if ((D) == 64) call(64) else if ((D) == 16) call(16) else TORCH_CHECK(false, "head width ", D)

std::vector<at::Tensor> forward(at::Tensor q, at::Tensor k, at::Tensor v, at::Tensor g, at::Tensor beta) {
    int64_t B = q.size(0), T = q.size(1), H = q.size(2), D = q.size(3), chunks = (T + CHUNK - 1) / CHUNK;
    auto o = at::empty_like(q), kept = at::empty({B, H, chunks, D, D}, q.options());
    each(B * H, [&](int64_t i) {
        int64_t at = i / H * T * H * D + i % H * D, one = i / H * T * H + i % H;
#define CALL(W) forward_job<W>(T, H * D, H, q.data_ptr<float>() + at, k.data_ptr<float>() + at, v.data_ptr<float>() + at, \
                               g.data_ptr<float>() + at, beta.data_ptr<float>() + one, o.data_ptr<float>() + at, \
                               kept.data_ptr<float>() + i * chunks * D * D);
        WIDTHS(D, CALL)
#undef CALL
    });
    return {o, kept};
}

std::vector<at::Tensor> backward(at::Tensor q, at::Tensor k, at::Tensor v, at::Tensor g, at::Tensor beta, at::Tensor kept,
                                 at::Tensor grad) {
    int64_t B = q.size(0), T = q.size(1), H = q.size(2), D = q.size(3), chunks = kept.size(2);
    auto dq = at::empty_like(q), dk = at::empty_like(q), dv = at::empty_like(q), dg = at::empty_like(q), db = at::empty_like(beta);
    each(B * H, [&](int64_t i) {
        int64_t at = i / H * T * H * D + i % H * D, one = i / H * T * H + i % H;
#define CALL(W) backward_job<W>(T, H * D, H, q.data_ptr<float>() + at, k.data_ptr<float>() + at, v.data_ptr<float>() + at, \
                                g.data_ptr<float>() + at, beta.data_ptr<float>() + one, \
                                kept.data_ptr<float>() + i * chunks * D * D, grad.data_ptr<float>() + at, \
                                dq.data_ptr<float>() + at, dk.data_ptr<float>() + at, dv.data_ptr<float>() + at, \
                                dg.data_ptr<float>() + at, db.data_ptr<float>() + one);
        WIDTHS(D, CALL)
#undef CALL
    });
    return {dq, dk, dv, dg, db};
}

// Short convolution, then SiLU: x [B, T, C], weight [C, W]; the last tap multiplies the current token.
static void convolve(const float* x, const float* w, int64_t t, int64_t C, int64_t W, float* z) {
    for (int64_t c = 0; c < C; c++) z[c] = 0;
    for (int64_t j = std::max<int64_t>(0, W - 1 - t); j < W; j++)
        for (int64_t c = 0; c < C; c++) z[c] += w[j * C + c] * x[(t - W + 1 + j) * C + c];
}

at::Tensor conv_forward(at::Tensor x, at::Tensor weight) {
    int64_t B = x.size(0), T = x.size(1), C = x.size(2), W = weight.size(1);
    auto y = at::empty_like(x), taps = weight.t().contiguous();
    each(B, [&](int64_t b) {
        const float* in = x.data_ptr<float>() + b * T * C;
        float* out = y.data_ptr<float>() + b * T * C;
        for (int64_t t = 0; t < T; t++, out += C) {
            convolve(in, taps.data_ptr<float>(), t, C, W, out);
            for (int64_t c = 0; c < C; c++) out[c] /= 1 + std::exp(-out[c]);
        }
    });
    return y;
}

std::vector<at::Tensor> conv_backward(at::Tensor x, at::Tensor weight, at::Tensor grad) {
    int64_t B = x.size(0), T = x.size(1), C = x.size(2), W = weight.size(1);
    auto dx = at::zeros_like(x), taps = weight.t().contiguous(), dw = at::zeros({B, W, C}, x.options());
    each(B, [&](int64_t b) {
        const float *in = x.data_ptr<float>() + b * T * C, *w = taps.data_ptr<float>(), *dy = grad.data_ptr<float>() + b * T * C;
        float *din = dx.data_ptr<float>() + b * T * C, *gw = dw.data_ptr<float>() + b * W * C;
        std::vector<float> z(C);
        for (int64_t t = 0; t < T; t++) {
            convolve(in, w, t, C, W, z.data());
            for (int64_t c = 0; c < C; c++) {
                float s = 1 / (1 + std::exp(-z[c]));
                z[c] = dy[t * C + c] * s * (1 + z[c] * (1 - s));
            }
            for (int64_t j = std::max<int64_t>(0, W - 1 - t); j < W; j++) {
                int64_t from = (t - W + 1 + j) * C;
                for (int64_t c = 0; c < C; c++) {
                    din[from + c] += w[j * C + c] * z[c];
                    gw[j * C + c] += in[from + c] * z[c];
                }
            }
        }
    });
    return {dx, dw.sum(0).t()};
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.def("forward", &forward, py::call_guard<py::gil_scoped_release>());
    m.def("backward", &backward, py::call_guard<py::gil_scoped_release>());
    m.def("conv_forward", &conv_forward, py::call_guard<py::gil_scoped_release>());
    m.def("conv_backward", &conv_backward, py::call_guard<py::gil_scoped_release>());
}
