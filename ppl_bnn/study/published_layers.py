"""The layers of the study's tables 1 to 6, as it printed them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedLayer:
    """A row: layer and type, output shape without the batch, parameters, and what it is connected to."""

    layer: str
    output_shape: str
    parameters: int
    connected_to: str


@dataclass(frozen=True)
class PublishedTable:
    """A table: the study's number and caption, run folder without ``study-``, network, rows and counts."""

    number: int
    caption: str
    run: str
    network: str
    deterministic: bool
    layers: tuple[PublishedLayer, ...]
    trainable: int
    non_trainable: int


def _layers(text: str) -> tuple[PublishedLayer, ...]:
    cells = ([*line.split("; "), ""] for line in text.strip().splitlines())
    return tuple(PublishedLayer(layer, shape, int(count), to) for layer, shape, count, to, *_ in cells)


# A line is: layer (type); output shape without the batch; parameters; connected to.
_TABLE_1 = """
input_1 (InputLayer); 32x32x3; 0
ConV_I_0 (Conv2DFlipout); 32x32x64; 3520
batch_normalization_v1; 32x32x64; 256
activation (Activation); 32x32x64; 0
ConV_II_0 (Conv2DFlipout); 32x32x64; 73792
batch_normalization_v1_1; 32x32x64; 256
activation_1 (Activation); 32x32x64; 0
Max_I_0 (MaxPooling2D); 16x16x64; 0
ConV_I_1 (Conv2DFlipout); 16x16x128; 147584
batch_normalization_v1_2; 16x16x128; 512
activation_2 (Activation); 16x16x128; 0
ConV_II_1 (Conv2DFlipout); 16x16x128; 295040
batch_normalization_v1_3; 16x16x128; 512
activation_3 (Activation); 16x16x128; 0
Max_I_1 (MaxPooling2D); 8x8x128; 0
ConV_I_2 (Conv2DFlipout); 8x8x256; 590080
batch_normalization_v1_4; 8x8x256; 1024
activation_4 (Activation); 8x8x256; 0
ConV_II_2 (Conv2DFlipout); 8x8x256; 1179904
batch_normalization_v1_5; 8x8x256; 1024
activation_5 (Activation); 8x8x256; 0
Max_I_2 (MaxPooling2D); 4x4x256; 0
ConV_I_3 (Conv2DFlipout); 4x4x512; 2359808
batch_normalization_v1_6; 4x4x512; 2048
activation_6 (Activation); 4x4x512; 0
ConV_II_3 (Conv2DFlipout); 4x4x512; 4719104
batch_normalization_v1_7; 4x4x512; 2048
activation_7 (Activation); 4x4x512; 0
Max_I_3 (MaxPooling2D); 2x2x512; 0
ConV_I_4 (Conv2DFlipout); 2x2x512; 4719104
batch_normalization_v1_8; 2x2x512; 2048
activation_8 (Activation); 2x2x512; 0
ConV_II_4 (Conv2DFlipout); 2x2x512; 4719104
batch_normalization_v1_9; 2x2x512; 2048
activation_9 (Activation); 2x2x512; 0
Max_I_4 (MaxPooling2D); 1x1x512; 0
flatten (Flatten); 512; 0
Dense_I_4 (DenseFlipout); 10; 10250
"""
_TABLE_2 = """
input_1 (InputLayer); 32x32x3; 0
ConV_I_0 (Conv2D); 32x32x64; 1792
batch_normalization (BatchNo; 32x32x64; 256
activation (Activation); 32x32x64; 0
ConV_II_0 (Conv2D); 32x32x64; 36928
batch_normalization_1 (Batch; 32x32x64; 256
activation_1 (Activation); 32x32x64; 0
Max_I_0 (MaxPooling2D); 16x16x128; 0
ConV_I_1 (Conv2D); 16x16x128; 73856
batch_normalization_2 (Batch; 16x16x128; 512
activation_2 (Activation); 16x16x128; 0
ConV_II_1 (Conv2D); 16x16x128; 147584
batch_normalization_3 (Batch; 16x16x128; 512
activation_3 (Activation); 16x16x128; 0
Max_I_1 (MaxPooling2D); 8x8x256; 0
ConV_I_2 (Conv2D); 8x8x256; 295168
batch_normalization_4 (Batch; 8x8x256; 1024
activation_4 (Activation); 8x8x256; 0
ConV_II_2 (Conv2D); 8x8x256; 590080
batch_normalization_5 (Batch; 8x8x256; 1024
activation_5 (Activation); 8x8x256; 0
Max_I_2 (MaxPooling2D); 4x4x512; 0
ConV_I_3 (Conv2D); 4x4x512; 1180160
batch_normalization_6 (Batch; 4x4x512; 2048
activation_6 (Activation); 4x4x512; 0
ConV_II_3 (Conv2D); 4x4x512; 2359808
batch_normalization_7 (Batch; 4x4x512; 2048
activation_7 (Activation); 4x4x512; 0
Max_I_3 (MaxPooling2D); 2x2x512; 0
ConV_I_4 (Conv2D); 2x2x512; 2359808
batch_normalization_8 (Batch; 2x2x512; 2048
activation_8 (Activation); 2x2x512; 0
ConV_II_4 (Conv2D); 2x2x512; 2359808
batch_normalization_9 (Batch; 2x2x512; 2048
activation_9 (Activation); 2x2x512; 0
Max_I_4 (MaxPooling2D); 1x1x512; 0
flatten (Flatten); 512; 0
Dense_I_4 (Dense); 10; 5130
"""
_TABLE_3 = """
input_1 (InputLayer); 32x32x3; 0
cond2d_flipout; 32x32x64; 3520; input_1[0][0]
batch_normalization; 32x32x64; 256; cond2d_flipout[0][0]
activation; 32x32x64; 0; batch_normalization[0][0]
conv2d_flipout_2; 32x32x64; 73792; activation[0][0]
batch_normalization_1; 32x32x64; 256; conv2d_flipout_2[0][0]
activation_1; 32x32x64; 0; batch_normalization_1[0][0]
conv2d_flipout_3; 32x32x64; 73792; activation_1[0][0]
conv2d_flipout_1; 32x32x64; 8256; activation[0][0]
add; 32x32x64; 0; cond2d_flipout_3[0][0] cond2d_flipout_1[0][0]
batch_normalization_2; 32x32x64; 256; add[0][0]
activation_2; 32x32x64; 0; batch_normalization_2[0][0]
conv2d_flipout_5; 16x16x128; 147584; activation_2[0][0]
batch_normalization_3; 16x16x128; 512; conv2d_flipout_5[0][0]
activation_3; 16x16x128; 0; batch_normalization_3[0][0]
conv2d_flipout_6; 16x16x128; 295040; activation_3[0][0]
conv2d_flipout_4; 16x16x128; 16512; activation_2[0][0]
add_1; 16x16x128; 0; cond2d_flipout_6[0][0] cond2d_flipout_4[0][0]
batch_normalization_4; 16x16x128; 512; add_1[0][0]
activation_4; 16x16x128; 0; batch_normalization_4[0][0]
conv2d_flipout_8; 8x8x256; 590080; activation_4[0][0]
batch_normalization_5; 8x8x256; 1024; conv2d_flipout_8[0][0]
activation_5; 8x8x256; 0; batch_normalization_5[0][0]
conv2d_flipout_9; 8x8x256; 1179904; activation_5[0][0]
conv2d_flipout_7; 8x8x256; 65792; activation_4[0][0]
add_2; 8x8x256; 0; cond2d_flipout_9[0][0] cond2d_flipout_7[0][0]
batch_normalization_6; 8x8x256; 1024; add_2[0][0]
activation_6; 8x8x256; 0; batch_normalization_6[0][0]
conv2d_flipout_11; 4x4x512; 2359808; activation_6[0][0]
batch_normalization_7; 4x4x512; 2048; conv2d_flipout_11[0][0]
activation_7; 4x4x512; 0; batch_normalization_7[0][0]
conv2d_flipout_12; 4x4x512; 4719104; activation_7[0][0]
conv2d_flipout_10; 4x4x512; 262656; activation_6[0][0]
add_3; 4x4x512; 0; cond2d_flipout_12[0][0] cond2d_flipout_10[0][0]
batch_normalization_8; 4x4x512; 2048; add_3[0][0]
activation_8; 4x4x512; 0; batch_normalization_8[0][0]
average_pooling2d; 1x1x512; 0; activation_8[0][0]
flatten; 512; 0; average_pooling2d[0][0]
dense_flipout; 10; 10250; flatten[0][0]
"""
_TABLE_4 = """
input_1 (InputLayer); 32x32x3; 0
Conv_block_I (Conv2D); 32x32x64; 1792; input_1[0][0]
batch_normalization (BatchNorma; 32x32x64; 256; Conv_block_I[0][0]
activation (Activation); 32x32x64; 0; batch_normalization[0][0]
Conv_block_I_0 (Conv2D); 32x32x64; 36928; activation[0][0]
batch_normalization_1 (BatchNor; 32x32x64; 256; Conv_block_I_0[0][0]
activation_1 (Activation); 32x32x64; 0; batch_normalization_1[0][0]
Conv_block_II_0 (Conv2D); 32x32x64; 36928; activation_1[0][0]
conv2d (Conv2D); 32x32x64; 4160; activation[0][0]
add (Add); 32x32x64; 0; Conv_block_II_0[0][0] conv2d[0][0]
batch_normalization_2 (BatchNor; 32x32x64; 256; add[0][0]
activation_2 (Activation); 32x32x64; 0; batch_normalization_2[0][0]
Conv_block_I_1 (Conv2D); 16x16x128; 73856; activation_2[0][0]
batch_normalization_3 (BatchNor; 16x16x128; 512; Conv_block_I_1[0][0]
activation_3 (Activation); 16x16x128; 0; batch_normalization_3[0][0]
Conv_block_II_1 (Conv2D); 16x16x128; 147584; activation_3[0][0]
conv2d_1 (Conv2D); 16x16x128; 8320; activation_2[0][0]
add_1 (Add); 16x16x128; 0; Conv_block_II_1[0][0] conv2d_1[0][0]
batch_normalization_4 (BatchNor; 16x16x128; 512; add_1[0][0]
activation_4 (Activation); 16x16x128; 0; batch_normalization_4[0][0]
Conv_block_I_2 (Conv2D); 8x8x256; 295168; activation_4[0][0]
batch_normalization_5 (BatchNor; 8x8x256; 1024; Conv_block_I_2[0][0]
activation_5 (Activation); 8x8x256; 0; batch_normalization_5[0][0]
Conv_block_II_2 (Conv2D); 8x8x256; 590080; activation_5[0][0]
conv2d_2 (Conv2D); 8x8x256; 33024; activation_4[0][0]
add_2 (Add); 8x8x256; 0; Conv_block_II_2[0][0] conv2d_2[0][0]
batch_normalization_6 (BatchNor; 8x8x256; 1024; add_2[0][0]
activation_6 (Activation); 8x8x256; 0; batch_normalization_6[0][0]
Conv_block_I_3 (Conv2D); 4x4x512; 1180160; activation_6[0][0]
batch_normalization_7 (BatchNor; 4x4x512; 2048; Conv_block_I_3[0][0]
activation_7 (Activation); 4x4x512; 0; batch_normalization_7[0][0]
Conv_block_II_3 (Conv2D); 4x4x512; 2359808; activation_7[0][0]
conv2d_3 (Conv2D); 4x4x512; 131584; activation_6[0][0]
add_3 (Add); 4x4x512; 0; Conv_block_II_3[0][0] conv2d_3[0][0]
batch_normalization_8 (BatchNor; 4x4x512; 2048; add_3[0][0]
activation_8 (Activation); 4x4x512; 0; batch_normalization_8[0][0]
average_pooling2d (AveragePooli; 4x4x512; 0; activation_8[0][0]
flatten (Flatten); 512; 0; average_pooling2d[0][0]
Dense_I_3 (Dense); 10; 5130; flatten[0][0]
"""
_TABLE_5 = """
input_1 (InputLayer); 28x28x1; 0
Conv_1 (Conv2DFlipout); 5x5x256; 13056
Max_I_1 (MaxPooling2D); 2x2x256; 0
Conv_2 (Conv2DFlipout); 5x5x256; 3277056
flatten (Flatten); 2560; 0
Dense_I_4 (DenseFlipout); 10; 512010
"""
_TABLE_6 = """
input_1 (InputLayer); 784; 0
den_1 (DenseFlipout); 256; 401664
den_2 (DenseFlipout); 256; 131328
den_3 (DenseFlipout); 10; 5130
"""

TABLES = (
    PublishedTable(1, "BNN VGG-16", "cifar10-vgg16", "vgg16", False, _layers(_TABLE_1), 18_823_178, 5_888),
    PublishedTable(2, "CNN VGG-16", "cifar10-vgg16-cnn", "vgg16", True, _layers(_TABLE_2), 9_416_010, 5_888),
    PublishedTable(3, "BNN ResNet-18", "cifar10-resnet18", "resnet18", False, _layers(_TABLE_3), 9_810_058, 3_968),
    PublishedTable(4, "CNN ResNet-18", "cifar10-resnet18-cnn", "resnet18", True, _layers(_TABLE_4), 4_908_490, 3_968),
    PublishedTable(5, "BNN-Conv", "mnist-conv-start-9", "bnn-conv", False, _layers(_TABLE_5), 3_802_122, 0),
    PublishedTable(6, "BNN-FC", "mnist-fc-start-9", "bnn-fc", False, _layers(_TABLE_6), 538_122, 0),
)
