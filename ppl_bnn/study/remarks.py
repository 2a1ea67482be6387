"""What differs throughout, and where the study is at odds with itself."""

from ppl_bnn.study.page import Section
from ppl_bnn.study.work import Work


def remarks(work: Work) -> Section:
    """Return the last section of the page: remarks that belong to no single figure."""
    jpeg = [f"CIFAR-10 is read from JPEG files here ({work.options.cifar10}), so its pixels are not the study's."]
    section = Section("What differs throughout, and where the study contradicts itself")
    section.notes = [
        "**Software.** The study used TensorFlow 1.14, TensorFlow Probability 0.7 and Horovod 0.18 on Xeon Phi nodes. "
        "Ours is torch and Pyro.",
        *(jpeg if work.options.cifar10 else []),
        "**KL weight.** beta = 1 throughout, as in the study (section 3.2): the full KL over the number of examples.",
        "**Start of q.** Appendix A names an unconstrained scale of -9.0 with a standard deviation of 0.1 next to the "
        "large networks. For the MNIST networks it names none, so we show -9 and TensorFlow Probability's default, -3. "
        "loc starts at Normal(0, 0.1), that library's default too; the study does not say.",
        "**Batch.** Section 4.1 says 128 for figures 2a and b. The caption of figure 2c, section 4.2 (for figure 3c) "
        "and the appendix say 256.",
        "**Digits.** Section 3.1 says that MNIST has 50,000 training digits. It has 60,000. The commands of figure 8 "
        "say where ours were trained on fewer.",
        "**Training accuracy.** Section 4.3 says 0.923 for VGG-16, the caption of figure 4 says 0.91.",
        "**Draws.** Section 4.6 says that 1000 draws cost 18.3 times as much as 10; 2861.0 over 152.4 seconds "
        "(section 4.3) are 18.8.",
        "**GPUs.** Section 4.5 gives 56.21 and 22.51 seconds for 12 epochs of 100,000 digits on 8 GPUs. These are "
        "21,300 and 53,300 samples a second, not the 42,000 and 46,000 of the same section. And a throughput that is "
        "29 times the CPU's does not go with a time that is 11 times shorter.",
        "**Learning rate.** It is multiplied by the number of ranks, as in the study (train.lr_per_rank).",
    ]
    return section
