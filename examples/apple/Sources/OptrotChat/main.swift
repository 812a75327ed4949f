// A chat in the terminal with a package that `optrot-edge export --format mlx` wrote:
//   OptrotChat path/to/package
import Foundation
import MLXLLM
import MLXLMCommon

guard CommandLine.arguments.count == 2 else {
    print("usage: OptrotChat FOLDER")
    exit(2)
}
let folder = URL(fileURLWithPath: CommandLine.arguments[1], isDirectory: true)
let model = try await LLMModelFactory.shared.loadContainer(configuration: ModelConfiguration(directory: folder))
let session = ChatSession(model)

print("> ", terminator: "")
while let line = readLine() {
    for try await part in session.streamResponse(to: line) {
        print(part, terminator: "")
        fflush(stdout)
    }
    print("\n> ", terminator: "")
}
