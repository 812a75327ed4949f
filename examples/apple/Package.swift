// swift-tools-version: 5.12
import PackageDescription

let package = Package(
    name: "OptrotChat",
    platforms: [.macOS(.v14), .iOS(.v17)],
    dependencies: [
        .package(url: "https://github.com/ml-explore/mlx-swift-lm", .upToNextMinor(from: "2.30.3")),
    ],
    targets: [
        .executableTarget(
            name: "OptrotChat",
            dependencies: [
                .product(name: "MLXLLM", package: "mlx-swift-lm"),
                .product(name: "MLXLMCommon", package: "mlx-swift-lm"),
            ]),
    ]
)
