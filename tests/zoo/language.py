"""Models of text and other sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import manyhands as mh
from support import real_models
from zoo.case import Samples, case, recipe, tokens

VOCABULARY = 97


@case("transformers", "GPT-2")
def gpt2() -> mh.Recipe:
    """Tied embeddings, dropout; the loss is a sum and a weight."""
    return real_models.gpt2("fp32")


@case("transformers", "Llama with checkpointing")
def llama() -> mh.Recipe:
    """Grouped-query attention; activations are recomputed in backward."""
    return real_models.llama_checkpointed("fp32")


@case("transformers", "BERT")
def bert() -> mh.Recipe:
    """Masked language model with a tied decoder and token types."""
    return real_models.bert("fp32")


@case("transformers", "T5")
def t5() -> mh.Recipe:
    """Encoder and decoder share embeddings; the first block of each computes the others' position bias."""
    return real_models.t5("fp32")


@case("transformers", "Mixtral")
def mixtral() -> mh.Recipe:
    """Experts without tokens in some micro-batches; the router's loss."""
    return real_models.mixtral("fp32")


@case("peft", "LoRA on Llama")
def lora() -> mh.Recipe:
    """Frozen base with wrapped linear layers."""
    return real_models.lora("fp32")


@case("keras", "convolutional network")
def keras() -> mh.Recipe:
    """Batch norm's statistics are frozen parameters that forward changes."""
    return real_models.keras("fp32")


@case("transformers", "Whisper")
def whisper() -> mh.Recipe:
    """Sinusoidal positions as a frozen embedding, layer drop, cross attention."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=2, decoder_attention_heads=2, max_source_positions=16,
        max_target_positions=16, encoder_layerdrop=0.3, decoder_layerdrop=0.3, dropout=0.1, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "input_features": torch.randn(8, 32, generator=generator),
            "labels": torch.randint(4, VOCABULARY, (10,), generator=generator),
        }

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch, use_cache=False).loss

    return recipe(lambda: WhisperForConditionalGeneration(config), loss, Samples(make))


@case("transformers", "Mamba")
def mamba() -> mh.Recipe:
    """A state space model; the scan in plain PyTorch; parameters that are used outside of their layer."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0)
    return recipe(lambda: MambaForCausalLM(config), lambda model, batch: model(batch, labels=batch).loss, tokens())


@case("transformers", "XLNet")
def xlnet() -> mh.Recipe:
    """Relative positions in two streams, a mask as a parameter that is not used."""
    from transformers import XLNetConfig, XLNetLMHeadModel

    config = XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=2, d_inner=48)
    return recipe(lambda: XLNetLMHeadModel(config), lambda model, batch: model(batch, labels=batch).loss, tokens())


@case("transformers", "Wav2Vec2")
def wav2vec() -> mh.Recipe:
    """A parametrized weight norm, masks that numpy draws, layer drop, CTC loss."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8, 8), conv_stride=(4, 4), conv_kernel=(8, 4), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.3, mask_time_length=2,
        layerdrop=0.3, ctc_zero_infinity=True,
    )  # fmt: skip

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "input_values": torch.randn(400, generator=generator),
            "labels": torch.randint(1, 12, (5,), generator=generator),
        }

    return recipe(lambda: Wav2Vec2ForCTC(config), lambda model, batch: model(**batch).loss, Samples(make))


@case("sentence-transformers", "multiple negatives")
def sentences() -> mh.Recipe:
    """The loss is a module that owns the model, which is a sequence of dicts to dicts."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.models import Dense, Pooling

    from transformers import BertConfig, BertModel

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel(
                BertConfig(
                    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                    intermediate_size=48, max_position_embeddings=16,
                )
            )  # fmt: skip

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            found = self.bert(features["input_ids"], attention_mask=features["attention_mask"])
            return features | {"token_embeddings": found.last_hidden_state}

    def model() -> nn.Module:
        parts = [Encoder(), Pooling(32), Dense(32, 16)]
        return MultipleNegativesRankingLoss(SentenceTransformer(modules=parts, device="cpu"))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        sides = [batch, batch.flip(1)]
        return model([{"input_ids": side, "attention_mask": torch.ones_like(side)} for side in sides], None)

    return recipe(model, loss, tokens())


@case("x-transformers", "autoregressive wrapper")
def x_transformers() -> mh.Recipe:
    """Rotary positions, memory tokens, gated values, layer dropout, one key head."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    def model() -> nn.Module:
        layers = Decoder(
            dim=32, depth=2, heads=2, attn_dim_head=16, rotary_pos_emb=True, attn_one_kv_head=True, ff_glu=True,
            attn_gate_values=True, layer_dropout=0.2, use_rmsnorm=True,
        )  # fmt: skip
        net = TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=16, num_memory_tokens=2, attn_layers=layers)
        return AutoregressiveWrapper(net)

    return recipe(model, lambda model, batch: model(batch), tokens())


@case("perceiver-pytorch", "Perceiver")
def perceiver() -> mh.Recipe:
    """Layers that share weights; trained latents; lists of lists of modules."""
    from perceiver_pytorch import Perceiver

    def model() -> nn.Module:
        return Perceiver(
            num_freq_bands=2, depth=2, max_freq=4.0, input_channels=3, input_axis=1, num_latents=4, latent_dim=16,
            cross_dim_head=8, latent_dim_head=8, latent_heads=2, num_classes=5, attn_dropout=0.1,
            weight_tie_layers=True,
        )  # fmt: skip

    def make(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(10, 3, generator=generator), torch.randint(5, (), generator=generator)

    return recipe(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), Samples(make))


@case("performer-pytorch", "Performer")
def performer() -> mh.Recipe:
    """Random projections in buffers, which forward draws anew after some calls that it counts."""
    from performer_pytorch import PerformerLM

    def model() -> nn.Module:
        return PerformerLM(
            num_tokens=VOCABULARY, max_seq_len=12, dim=32, depth=2, heads=2, dim_head=16, causal=False,
            feature_redraw_interval=1, nb_features=8,
        )  # fmt: skip

    return recipe(
        model,
        lambda model, batch: F.cross_entropy(model(batch).transpose(1, 2), batch),
        tokens(),
        buffers={"*.calls_since_last_redraw": "last"},
    )


@case("mambapy", "Mamba with a parallel scan")
def parallel_scan() -> mh.Recipe:
    """An autograd function that overwrites its inputs in place."""
    from mambapy.mamba import Mamba, MambaConfig

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.body = nn.Embedding(VOCABULARY, 16), Mamba(MambaConfig(d_model=16, n_layers=2, d_state=4))
            self.head = nn.Linear(16, VOCABULARY)

        def forward(self, batch: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.body(self.tokens(batch))).transpose(1, 2), batch.roll(-1, 1))

    return recipe(Net, lambda model, batch: model(batch), tokens())


@case("torchaudio", "Conformer with an RNN transducer loss")
def conformer() -> mh.Recipe:
    """Sequences of several lengths, convolutions with batch norm, a spectrogram whose window is a buffer."""
    from torchaudio.models import Conformer
    from torchaudio.transforms import MelSpectrogram, TimeMasking

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sound = nn.Sequential(MelSpectrogram(1000, n_fft=64, n_mels=16), TimeMasking(4))
            self.body, self.head = Conformer(16, 2, 32, 2, 5, dropout=0.1), nn.Linear(16, 12)

        def forward(self, waves: Tensor, labels: Tensor) -> Tensor:
            frames = (self.sound(waves) + 1e-3).log().transpose(1, 2)
            lengths = torch.tensor([frames.shape[1], frames.shape[1] - 3])
            found, lengths = self.body(frames, lengths)
            scores = self.head(found).log_softmax(-1).transpose(0, 1)
            return F.ctc_loss(scores, labels, lengths, torch.full((2,), labels.shape[1]), zero_infinity=True)

    def make(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(600, generator=generator), torch.randint(1, 12, (4,), generator=generator)

    return recipe(Net, lambda model, batch: model(*batch), Samples(make))


@case("speechbrain", "ECAPA-TDNN with additive margin")
def speaker() -> mh.Recipe:
    """Wrapped batch norms, statistics pooling over lengths, features normalised by running statistics."""
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN, Classifier
    from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = ECAPA_TDNN(
                8, channels=[16, 16, 16, 16, 48], attention_channels=8, lin_neurons=16, se_channels=8, res2net_scale=4
            )
            self.head, self.loss = Classifier(16, out_neurons=5), LogSoftmaxWrapper(AdditiveAngularMargin(0.2, 30))

        def forward(self, frames: Tensor, labels: Tensor) -> Tensor:
            return self.loss(self.head(self.body(frames)), labels.unsqueeze(1))

    def make(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(20, 8, generator=generator), torch.randint(5, (), generator=generator)

    return recipe(Net, lambda model, batch: model(*batch), Samples(make))


@case("entmax", "sparse attention")
def sparse_attention() -> mh.Recipe:
    """An exponent that is trained by bisection; exact zeros."""
    from entmax import Entmax15Loss, entmax_bisect

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.exponent = nn.Embedding(VOCABULARY, 16), nn.Parameter(torch.tensor(1.4))
            self.project, self.head = nn.Linear(16, 16), nn.Linear(16, VOCABULARY)

        def forward(self, batch: Tensor) -> Tensor:
            x = self.tokens(batch)
            weights = entmax_bisect(self.project(x) @ x.transpose(1, 2), self.exponent)
            return Entmax15Loss()(self.head(weights @ x).flatten(0, 1), batch.flatten())

    return recipe(Net, lambda model, batch: model(batch), tokens())
